"""Llama-like layers whose small operators are one kernel each: fastrl._C on a CPU, Triton on a GPU; same values.

Where a layer's matrix products are narrow they take less time than the small operators between them. Each of the
three here (norm, feed-forward product, rotation) replaces five to ten of those, forward and backward. A replaced
module keeps its parameters, their names and its projections (so adapters still apply), and runs transformers' own code
for a precision or a device that its kernels do not know.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.layers import DTYPES, KERNELS, OPERATORS, gated, layers, normed, turned
from fastrl.train.attention import REGISTERED

LayerKernels = Literal["transformers", "triton"]


def use_native_layers(model: PreTrainedModel) -> int:
    """Let the known layers of a float32 model on the CPU run natively, from now on and in place.

    Known are the norms, the feed-forward layers with silu and the attention layers of Llama, Qwen2 and Qwen3, when they
    are of transformers' own classes. Without a build of fastrl._C, and for any other model, nothing changes.

    Returns:
        The number of modules that changed.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or not _is_built(next(model.parameters())):
        return 0
    return _replace(model, "native")


def use_triton_layers(model: PreTrainedModel) -> int:
    """Let the same layers of a model on a GPU run in Triton; sums and products in f32, rounded once.

    Returns:
        The number of modules that changed.

    Raises:
        RuntimeError: Triton cannot run on the model's device, or in its precision.
        ValueError: the model has no layer that is known.
    """
    remedy = "set kernels.layers to transformers"
    try:
        choose("triton", next(model.parameters()), Implementations("the layers", triton=KERNELS))
    except RuntimeError as error:
        raise RuntimeError(f"kernels.layers: {error}; {remedy}") from None
    if model.dtype not in DTYPES["triton"]:
        raise RuntimeError(f"kernels.layers: triton is for bfloat16, float16 and float32, not {model.dtype}; {remedy}")
    changed = _replace(model, "triton")
    if not any(type(module) in _NATIVE.values() for module in model.modules()):
        raise ValueError(
            f"kernels.layers: triton knows the layers of Llama, Qwen2 and Qwen3, not {type(model).__name__}'s; {remedy}"
        )
    return changed


def _replace(model: PreTrainedModel, backend: str) -> int:
    changed = 0
    for module in model.modules():
        native = type(module) if type(module) in _NATIVE.values() else _NATIVE.get(type(module))
        if native is None or (issubclass(native, _NativeMLP) and type(module.act_fn) is not type(ACT2FN["silu"])):
            continue
        changed += (type(module), module.__dict__.get("backend")) != (native, backend)
        module.__class__ = native
        module.backend = backend
    return changed


class _NativeNorm:
    weight: nn.Parameter
    variance_epsilon: float
    backend: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _knows(self.backend, hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        return normed(hidden_states, self.weight, self.variance_epsilon, layers(self.backend))


class _NativeMLP:
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    backend: str

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _knows(self.backend, gate, up):
            return self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]
        return self.down_proj(gated(gate, up, layers(self.backend)))  # type: ignore[no-any-return]


class _NativeAttention:
    """Transformers' forward with the rotations in one kernel, before heads and positions change places."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self.config._attn_implementation
        if implementation not in REGISTERED.values() or not _knows(self.backend, hidden_states, *position_embeddings):
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
        cos, sin = (x.expand(batch, length, -1).reshape(batch * length, -1) for x in position_embeddings)
        pair = turned(query.flatten(0, 1), key.flatten(0, 1), cos, sin, layers(self.backend))
        query, key, value = (x.view(batch, length, -1, self.head_dim).transpose(1, 2) for x in (*pair, value))
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


def _knows(backend: str, *tensors: Tensor) -> bool:
    """Whether all are of one type that the backend's kernels know, where they run."""
    first = tensors[0]
    runs = first.device.type == "cpu"
    if backend == "triton":
        runs = first.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return (
        runs
        and first.dtype in DTYPES[backend]
        and all((x.dtype, x.device) == (first.dtype, first.device) for x in tensors)
    )


def _is_built(parameter: Tensor) -> bool:
    return all(choose(None, parameter, Implementations(x, native=f"fastrl::{x}")) == "native" for x in OPERATORS)
