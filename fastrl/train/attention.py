"""Attention over sequences packed end to end, through transformers' attention interface.

    out[t] = sum over s <= t in the same sequence of softmax_s(q[t] . k[s] * scaling) v[s]

Three kernels carry it: `torch.nn.attention.varlen` and flash-attn on CUDA, and bucketed SDPA anywhere, in whose place
fastrl._C attends short float32 sequences on a CPU. Each is registered under a name of its own; a model whose config
names one of them is packed when a forward pass brings `packing=`, and is plain SDPA otherwise, so that one model object
trains and samples without switching modes.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastrl.train import native_attention
from fastrl.train.packed_sdpa import Buckets, bucketed, causal_band, packed_sdpa, softcapped
from fastrl.train.shared_rows import spread

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from fastrl.types import SharedRows

Implementation = Literal["auto", "sdpa", "varlen", "flash"]

# transformers takes a name that contains "flash" or "sdpa" for one of its own.
REGISTERED = {"sdpa": "fastrl_buckets", "varlen": "fastrl_varlen", "flash": "fastrl_fa"}


@dataclass(frozen=True, slots=True)
class Packing:
    """The borders of the sequences in one packed row: what a forward pass hands to every layer.

    Attributes:
        cu_seqlens: [S + 1] int32.
        max_seqlen: length of the longest sequence.
        buckets: the plan of bucketed SDPA; None for the kernels that read `cu_seqlens`, native ones included.
        shared: the rows that are there once for several positions; the borders are those of all positions.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    buckets: Buckets | None
    shared: SharedRows | None = None


def packing(model: PreTrainedModel, cu_seqlens: Tensor, max_seqlen: int, shared: SharedRows | None = None) -> Packing:
    """What `model`'s attention kernel needs to know about one packed batch.

    Raises:
        ValueError: the model does not use packed attention.
    """
    name = model.config._attn_implementation
    if name not in REGISTERED.values():
        raise ValueError(
            f"the model attends through {name!r}, which would mix packed sequences; "
            "load it with fastrl.train.model.load_model or call fastrl.train.attention.use_packed_attention"
        )
    needs_buckets = name == REGISTERED["sdpa"] and not native_attention.is_available(
        next(model.parameters()), max_seqlen
    )
    return Packing(cu_seqlens, max_seqlen, bucketed(cu_seqlens) if needs_buckets else None, shared)


def use_packed_attention(model: PreTrainedModel, implementation: Implementation = "auto") -> None:
    """Make `model` attend through packed kernels: "auto" takes varlen where it can run, else bucketed SDPA.

    Raises:
        RuntimeError: the kernel asked for cannot run here.
        ValueError: the model's family does not go through transformers' attention interface.
    """
    if not model._supports_attention_backend:
        raise ValueError(
            f"{type(model).__name__} does not go through transformers' attention interface, so its sequences "
            "cannot be packed; use a family that does (Llama, Qwen, Gemma, Mistral, GPT-2, GPT-NeoX, ...)"
        )
    obstacle = {"varlen": _varlen_obstacle, "flash": _flash_obstacle}
    chosen = implementation
    if implementation == "auto":
        chosen = "sdpa" if _varlen_obstacle(model) else "varlen"
    elif implementation in obstacle and (reason := obstacle[implementation](model)):
        raise RuntimeError(f"attention {implementation!r} {reason}; use 'auto' or 'sdpa'")
    model.set_attn_implementation(REGISTERED[chosen])


def _packed_varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """[T, H, E] through torch.nn.attention.varlen, which counts the keys to the left of a row, itself excluded."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in _varlen_options():
        options = {}
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    left = -1 if window is None else window - 1
    out = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(left, 0), **options
    )
    assert isinstance(out, Tensor)
    return out


def _packed_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[T, H, E] through flash-attn, whose window also excludes the row itself."""
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0,
    )
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=1)
def _varlen_options() -> frozenset[str]:
    """Names of varlen_attn's arguments; empty where torch has no such module. They grew from release to release."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _flash_obstacle(model: PreTrainedModel) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the module flash_attn, which is not installed"
    return _cuda_obstacle(model)


def _varlen_obstacle(model: PreTrainedModel) -> str | None:
    if not {"scale", "window_size"} <= _varlen_options():
        return f"needs scale and window_size in torch.nn.attention.varlen (torch 2.11), and this is {torch.__version__}"
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return "cannot cap attention logits, as this model does"
    return _cuda_obstacle(model)


def _cuda_obstacle(model: PreTrainedModel) -> str | None:
    """What keeps a flash kernel from running, in words that follow the kernel's name; None when nothing does."""
    head_dim = _head_dim(model)
    if model.device.type != "cuda":
        return f"needs a CUDA device, and the model is on {model.device.type}"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 weights, and the model has {model.dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"needs heads of at most 256 and a multiple of 8, and the model's have {head_dim}"
    return None


def _register(kind: str) -> None:
    """Announce one kernel and its mask to transformers; the mask is SDPA's, and packed passes do not read it."""

    def attend(
        module: nn.Module,
        query: Tensor,  # [B, H, T, E]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        packing: Packing | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if packing is None:
            if softcap is None:
                result: tuple[Tensor, None] = sdpa_attention_forward(
                    module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
                )
                return result
            if attention_mask is None and query.shape[2] > 1:  # SDPA's mask function says None for plain causal
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
                attention_mask = causal_band(query.shape[2], query.shape[2], query.device)
            return softcapped(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None

        for name in ("s_aux", "position_bias"):
            if others.get(name) is not None:
                raise ValueError(f"packed attention does not know {name!r}, which {type(module).__name__} uses")
        if dropout > 0:
            raise ValueError("packed attention has no dropout: set the model's attention dropout to 0")
        q, k, v = (rows[0].transpose(0, 1) for rows in (query, key, value))  # [T, heads, E]
        if packing.shared is not None:
            q, k, v = (spread(rows, packing.shared) for rows in (q, k, v))
        if kind == "varlen":
            out = _packed_varlen(q, k, v, packing, scaling, sliding_window)
        elif kind == "flash":
            out = _packed_flash(q, k, v, packing, scaling, sliding_window, softcap)
        elif packing.buckets is None and (sliding_window, softcap) == (None, None):
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            out = native_attention.packed_attention(q, k, v, packing.cu_seqlens, scaling=scale)
        else:
            buckets = packing.buckets or bucketed(packing.cu_seqlens)
            out = packed_sdpa(q, k, v, buckets, scaling=scaling, window=sliding_window, softcap=softcap)
        if packing.shared is not None:
            out = out.index_select(0, packing.shared.kept)
        return out[None], None

    AttentionInterface.register(REGISTERED[kind], attend)
    AttentionMaskInterface.register(REGISTERED[kind], sdpa_mask)


for _kind in REGISTERED:
    _register(_kind)
