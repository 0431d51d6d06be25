"""One decoding step of the Llama family in few operators: one new token of each row, the same numbers, less dispatch.

    a = x + Wo attention(rope(Wq n), rope(Wk n), Wv n),   n = norm(x)
    y = a + Wd (silu(Wg m) * Wu m),                       m = norm(a)

Transformers' modules spend most of a small model's step between the operators. Here query, key and value are one
product, so are gate and up, residuals are added by the product that ends a block, and the rotations come from a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fastrl.rollout.decode_operators import Heads, operators_for

FUSED_BYTES = 128 << 20  # weights up to this size are copied side by side for a call; larger ones are multiplied singly
STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # their angles depend on the position alone


def _family(module: Any, name: str) -> tuple[type, frozenset[type], tuple[type, ...]]:
    """The causal model, the parts it must have exactly, and the parts that a subclass with the same values may be."""
    model, *exact = (
        getattr(module, name + part) for part in ("ForCausalLM", "Model", "DecoderLayer", "RotaryEmbedding")
    )
    extensible = tuple(getattr(module, name + part) for part in ("Attention", "MLP", "RMSNorm"))
    torch_parts = (nn.ModuleList, nn.Linear, nn.Embedding, type(ACT2FN["silu"]))
    return model, frozenset((model, *exact, *torch_parts)), extensible


_FAMILIES = {
    model: (exact, extensible)
    for model, exact, extensible in (_family(llama, "Llama"), _family(qwen2, "Qwen2"), _family(qwen3, "Qwen3"))
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer; several matrices with the same input are one where that copy is small.

    Attributes:
        qkv, gate_up: output rows in this order.
        qkv_bias: None without one.
        head_norm: [H + K, d] weight of the norm over each head; None without one.
        output, down: as (in, out), for addmm.
    """

    norm: Tensor
    qkv: tuple[Tensor, ...]
    qkv_bias: Tensor | None
    head_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor


def is_known(model: PreTrainedModel) -> bool:
    """Whether `LlamaDecode` computes what `model` computes, as far as its structure tells.

    Every part must be of the class that transformers gives it (norms, attention and feed-forward layers may be of a
    subclass), without hooks or a forward of its own; no window, silu, angles that depend on the position alone, no
    bias but that of query, key and value. Linear layers may have LoRA adapters of peft where their sum with the weight
    may be copied: it is small, and of a precision that does not round the adapter away.
    """
    if type(model) not in _FAMILIES:
        return False
    exact, extensible = _FAMILIES[type(model)]
    adapted = [module.weight for module in model.modules() if _has_adapter(module)]
    if adapted and (adapted[0].dtype != torch.float32 or sum(weight.nbytes for weight in adapted) > FUSED_BYTES):
        return False
    for module in _parts(model):
        if type(module) not in exact and not isinstance(module, extensible):
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
    config, backbone = model.config, model.model
    unbiased = [model.lm_head]
    for layer in backbone.layers:
        unbiased += [layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    return (
        set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and config.hidden_act == "silu"
        and config.num_hidden_layers == len(backbone.layers)
        and backbone.rotary_emb.rope_type in STATIC_ROPES
        and all(part.bias is None for part in unbiased)
    )


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """Every module; of a linear layer with adapters the layer below them alone."""
    inside = ""
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        inside = f"{path}." if _has_adapter(module) else ""
        yield module.base_layer if inside else module  # type: ignore[misc]


def _has_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight")


class LlamaDecode:
    """The weights of a model `is_known` accepts, laid out for decoding; valid until they change.

    Args:
        model: read once, now.
        context: positions to prepare rotations for.

    Cost: a copy of each layer's input matrices when all of them fit FUSED_BYTES; else views alone, and sums where there
        are adapters.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, *, context: int) -> None:
        config, backbone = model.config, model.model
        attention = backbone.layers[0].self_attn
        self.heads = Heads(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            attention.scaling,
            config.rms_norm_eps,
        )
        self.embedding = backbone.embed_tokens.weight.detach()
        self.norm = backbone.norm.weight.detach()
        self.head = model.lm_head.weight.detach()
        self.operators = operators_for(self.embedding)
        inputs = [weight for layer in backbone.layers for weight in (*_qkv(layer), *_gate_up(layer))]
        is_fused = sum(weight.nbytes for weight in inputs) <= FUSED_BYTES
        self.layers = [self._layer(layer, is_fused) for layer in backbone.layers]
        positions = torch.arange(context, device=model.device)
        cos, sin = backbone.rotary_emb(self.embedding[:1], positions[None])  # [1, context, d], both halves alike
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    def __call__(self, token: Tensor, position: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Feed one token per row.

        Args:
            token: [B] int64.
            position: [B] int64, below `context`.
            mask: [B, 1, 1, n] additive over what the cache holds, the new token included; None sees everything.
            cache: `RoomyLayer`s; each is given the new keys and values.

        Returns:
            [B, V] logits in the model's dtype.
        """
        normed, epsilon = self.operators.normed, self.heads.epsilon
        angles = self.cos[position], self.sin[position]
        x = self.embedding[token]
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            qkv = _product(normed(x, layer.norm, epsilon), layer.qkv, layer.qkv_bias)
            seen = self.operators.attended(qkv, layer.head_norm, angles, kept, mask, self.heads)
            x = torch.addmm(x, seen, layer.output)
            gate_up = _product(normed(x, layer.mlp_norm, epsilon), layer.gate_up, None)
            x = torch.addmm(x, self.operators.gated(gate_up), layer.down)
        return F.linear(normed(x, self.norm, epsilon), self.head)

    def _layer(self, layer: Any, is_fused: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        biases = [part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        head_norm = None
        if isinstance(attention, qwen3.Qwen3Attention):
            norms = [attention.q_norm.weight] * self.heads.query + [attention.k_norm.weight] * self.heads.key
            head_norm = torch.stack(norms)
        qkv, gate_up = _qkv(layer), _gate_up(layer)
        return _Layer(
            norm=layer.input_layernorm.weight.detach(),
            qkv=(torch.cat(qkv),) if is_fused else qkv,
            qkv_bias=None if biases[0] is None else torch.cat(biases),
            head_norm=head_norm,
            output=_matrix(attention.o_proj).t(),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=(torch.cat(gate_up),) if is_fused else gate_up,
            down=_matrix(mlp.down_proj).t(),
        )


def _qkv(layer: Any) -> tuple[Tensor, ...]:
    attention = layer.self_attn
    return tuple(_matrix(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj))


def _gate_up(layer: Any) -> tuple[Tensor, ...]:
    return _matrix(layer.mlp.gate_proj), _matrix(layer.mlp.up_proj)


def _matrix(linear: Any) -> Tensor:
    """[out, in] what a linear layer multiplies with: its weight, and its active adapters where it has some."""
    weight: Tensor = linear.weight.detach()
    for name in linear.active_adapters if _has_adapter(linear) else ():
        if name in linear.lora_A:
            weight = weight + linear.get_delta_weight(name)
    return weight


def _product(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """x times every matrix, side by side."""
    if len(weights) == 1:
        return F.linear(x, weights[0], bias)
    joined = torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
    return joined if bias is None else joined + bias
