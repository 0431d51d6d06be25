"""Rows of the native CPU layers: norm, feed-forward product, rotation, attention, against what runs without them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import Compiled, Row, register
from fastrl.train.native_attention import packed_attention
from fastrl.train.packed_sdpa import bucketed, packed_sdpa

EPSILON = 1e-6
# packed tokens of 64 completions of 32 tokens, at the widths of bench.grpo_step; one row is one layer's input
WIDE = {"D=64": (2368, 64), "D=128": (2368, 128), "D=1024": (2368, 1024)}
HEADS = {"4 x 16": (2368, 4, 16), "4 x 32": (2368, 4, 32), "16 x 64": (2368, 16, 64)}

# sequences, longest, query heads, key heads, width of a head
ATTENTION = {
    "420 of 14": (420, 14, 4, 2, 16),
    "64 of 37": (64, 37, 4, 2, 32),
    "16 of 128": (16, 128, 4, 2, 32),
    "4 of 512": (4, 512, 4, 2, 64),
    "2 of 1024": (2, 1024, 8, 4, 64),
}


def randoms(*shapes: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def norm_inputs(
    rows: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """x [T, D], weight [D]."""
    return randoms((rows, width), (width,), dtype=dtype, device=device)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """As `LlamaRMSNorm`, but for its rounding to float32, which would spoil the truth in float64."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON))


def fused_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPSILON)


def swiglu_inputs(
    rows: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """gate, up [T, 2 D]."""
    return randoms((rows, 2 * width), (rows, 2 * width), dtype=dtype, device=device)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rotary_inputs(
    rows: int, heads: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """x [T, H, d], cos, sin [T, d]."""
    (x,) = randoms((rows, heads, width), dtype=dtype, device=device)
    angle = torch.outer(torch.arange(rows) % 37, 10000.0 ** -torch.linspace(0, 1, width // 2 + 1)[:-1])
    angle = torch.cat([angle, angle], dim=-1)
    return x, angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' `apply_rotary_pos_emb`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def attention_inputs(
    sequences: int,
    longest: int,
    heads: int,
    key_heads: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """query [T, H, d], key, value [T, K, d], cu_seqlens [S + 1]: lengths within an eighth of the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest - longest // 8, longest + 1, (sequences,), generator=generator)
    total = int(lengths.sum())
    columns = randoms(
        (total, heads, width), (total, key_heads, width), (total, key_heads, width), dtype=dtype, device=device
    )
    return *columns, F.pad(lengths.cumsum(0), (1, 0)).int().to(device)


def bucketed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    return packed_sdpa(query, key, value, bucketed(cu_seqlens), scaling=query.shape[-1] ** -0.5)


def native_packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    return packed_attention(query, key, value, cu_seqlens, scaling=query.shape[-1] ** -0.5)


def layer(name: str, **options: float) -> Callable[..., Tensor]:
    """A function of fastrl.train.native_layers, which imports transformers: only when it is called."""
    return lambda *inputs: getattr(import_module("fastrl.train.native_layers"), name)(*inputs, **options)


def native(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, or a sentence where fastrl._C was not built or the inputs are not its own."""

    def call(*inputs: Tensor) -> Tensor:
        if find_spec("fastrl._C") is None:
            raise RuntimeError("needs the compiled extension 'fastrl._C'")
        if inputs[0].is_cuda or inputs[0].dtype != torch.float32:
            raise RuntimeError("is for float32 on the CPU")
        import_module("fastrl._C")
        return function(*inputs)

    return call


register(
    Row(
        name="layer_norm_native",
        make_inputs=norm_inputs,
        spec=norm,
        contenders={
            "transformers": norm,
            "torch.rms_norm": fused_norm,
            "compile": Compiled(norm),
            "native": native(layer("rms_norm", epsilon=EPSILON)),
        },
        shapes=WIDE,
        quick_shapes=WIDE,
    ),
    Row(
        name="layer_swiglu_native",
        make_inputs=swiglu_inputs,
        spec=swiglu,
        contenders={
            "transformers": swiglu,
            "compile": Compiled(swiglu),
            "native": native(layer("swiglu")),
        },
        shapes=WIDE,
        quick_shapes=WIDE,
    ),
    Row(
        name="layer_rotary_native",
        make_inputs=rotary_inputs,
        spec=rotary,
        contenders={
            "transformers": rotary,
            "compile": Compiled(rotary),
            "native": native(layer("rotary")),
        },
        shapes=HEADS,
        quick_shapes=HEADS,
        differentiable=(0,),
    ),
    Row(
        name="packed_attention_native",
        make_inputs=attention_inputs,
        spec=bucketed_attention,
        contenders={"bucketed sdpa": bucketed_attention, "native": native(native_packed_attention)},
        shapes=ATTENTION,
        quick_shapes=ATTENTION,
    ),
)
