"""Norms, feed-forward products and rotations of Llama-like layers through fastrl._C: float32 on a CPU, same values.

At a few hundred columns a layer's matrix products take less time than the small operators between them. Each of the
three here replaces five to ten of those, forward and backward. A replaced module keeps its parameters, their names and
its projections (so adapters still apply), and runs transformers' own code for any other precision or device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from fastrl.ops.backend import Implementations, choose
from fastrl.train.attention import REGISTERED

OPERATORS = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotary")


def use_native_layers(model: PreTrainedModel) -> int:
    """Let the known layers of a float32 model on the CPU run natively, from now on and in place.

    Known are the norms, the feed-forward layers with silu and the attention layers of Llama, Qwen2 and Qwen3, when they
    are of transformers' own classes. Without a build of fastrl._C, and for any other model, nothing changes.

    Returns:
        The number of modules that changed.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or not _is_built(next(model.parameters())):
        return 0
    changed = 0
    for module in model.modules():
        native = _NATIVE.get(type(module))
        if native is None or (issubclass(native, _NativeMLP) and type(module.act_fn) is not type(ACT2FN["silu"])):
            continue
        module.__class__ = native
        changed += 1
    return changed


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis.

    Args:
        x: [..., D] float32 on the CPU; differentiable.
        weight: [D]; differentiable.
    """
    result: Tensor = _RMSNorm.apply(x, weight, epsilon)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both float32 on the CPU, of one shape, differentiable."""
    result: Tensor = _SwiGLU.apply(gate, up)
    return result


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of a head.

    Args:
        x: [T, H, d] float32 on the CPU; differentiable.
        cos, sin: [T, d], both halves alike; constant.
    """
    result: Tensor = _Rotary.apply(x, cos, sin)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = torch.ops.fastrl.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = torch.ops.fastrl.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors)
        return dx, dweight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        width = gate.shape[-1]
        return torch.ops.fastrl.swiglu(gate.view(-1, width), up.view(-1, width)).view_as(gate)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.fastrl.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)  # type: ignore[no-any-return]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.ops.fastrl.rotary(x.contiguous(), cos, sin, False)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.fastrl.rotary(grad.contiguous(), *ctx.saved_tensors, True), None, None


class _NativeNorm:
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _is_native(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        return rms_norm(hidden_states, self.weight, epsilon=self.variance_epsilon)


class _NativeMLP:
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _is_native(gate, up):
            return self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]
        return self.down_proj(swiglu(gate, up))  # type: ignore[no-any-return]


class _NativeAttention:
    """Transformers' forward with the rotations done natively, before heads and positions change places."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self.config._attn_implementation
        if implementation not in REGISTERED.values() or not _is_native(hidden_states, *position_embeddings):
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        batch, length = hidden_states.shape[:2]
        query, key, value = (
            part(hidden_states).view(batch, length, -1, self.head_dim)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if isinstance(self, Qwen3Attention):
            query, key = self.q_norm(query), self.k_norm(key)
        angles = [x.expand(batch, length, -1).reshape(batch * length, -1).contiguous() for x in position_embeddings]
        query, key = (rotary(x.flatten(0, 1), *angles).view_as(x) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attended, weights = ALL_ATTENTION_FUNCTIONS[implementation](
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )
        return self.o_proj(attended.reshape(batch, length, -1)), weights


class NativeLlamaRMSNorm(_NativeNorm, LlamaRMSNorm):
    """Llama's norm."""


class NativeQwen2RMSNorm(_NativeNorm, Qwen2RMSNorm):
    """Qwen2's norm."""


class NativeQwen3RMSNorm(_NativeNorm, Qwen3RMSNorm):
    """Qwen3's norm, of the stream and of query and key heads."""


class NativeLlamaMLP(_NativeMLP, LlamaMLP):
    """Llama's feed-forward layer."""


class NativeQwen2MLP(_NativeMLP, Qwen2MLP):
    """Qwen2's feed-forward layer."""


class NativeQwen3MLP(_NativeMLP, Qwen3MLP):
    """Qwen3's feed-forward layer."""


class NativeLlamaAttention(_NativeAttention, LlamaAttention):
    """Llama's attention."""


class NativeQwen2Attention(_NativeAttention, Qwen2Attention):
    """Qwen2's attention."""


class NativeQwen3Attention(_NativeAttention, Qwen3Attention):
    """Qwen3's attention, with a norm over each query and key head."""


_NATIVE: dict[type, type] = {
    LlamaRMSNorm: NativeLlamaRMSNorm,
    LlamaMLP: NativeLlamaMLP,
    LlamaAttention: NativeLlamaAttention,
    Qwen2RMSNorm: NativeQwen2RMSNorm,
    Qwen2MLP: NativeQwen2MLP,
    Qwen2Attention: NativeQwen2Attention,
    Qwen3RMSNorm: NativeQwen3RMSNorm,
    Qwen3MLP: NativeQwen3MLP,
    Qwen3Attention: NativeQwen3Attention,
}


def _is_native(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def _is_built(parameter: Tensor) -> bool:
    return all(choose(None, parameter, Implementations(x, native=f"fastrl::{x}")) == "native" for x in OPERATORS)
