"""Rows of a layer's small operators (norm, feed-forward product, rotation) and of attention on short sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import imported, on_gpu
from bench.registry import Compiled, Row, register
from fastrl.ops.layers import rms_norm, rotary, swiglu
from fastrl.train.native_attention import packed_attention
from fastrl.train.packed_sdpa import bucketed, packed_sdpa

EPSILON = 1e-6
# packed tokens of 64 completions of 32 tokens, at the widths of bench.grpo_step; one row is one layer's input
WIDE = {"D=64": (2368, 64), "D=1024": (2368, 1024)}
HEADS = {"4 x 16": (2368, 4, 16), "16 x 64": (2368, 16, 64)}
# a full micro-batch of `fastrl plan`; of the norm also the heads of qwen3-0.6b as rows
GPU_WIDE = {"qwen3-0.6b": (16_384, 1024), "qwen3-8b": (16_384, 4096)}
GPU_NORM = {**GPU_WIDE, "q/k norm": (262_144, 128), "odd": (16_383, 1023)}
GPU_GATED = {"qwen3-0.6b": (16_384, 3072), "qwen3-8b": (16_384, 12_288)}
GPU_HEADS = {"qwen3-0.6b": (16_384, 16, 128), "qwen3-8b": (16_384, 32, 128)}

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


def transformers_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`LlamaRMSNorm`."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * wide.to(x.dtype)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPSILON)


def liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Liger's norm; its product and its rotation write over their inputs, which the contenders of a row share."""
    module = imported("liger_kernel.ops.rms_norm", "liger-kernel")
    on_gpu(x, "Liger's norm")
    y: Tensor = module.LigerRMSNormFunction.apply(x, weight, EPSILON)
    return y


def swiglu_inputs(
    rows: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """gate, up [T, I]."""
    return randoms((rows, width), (rows, width), dtype=dtype, device=device)


def transformers_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rotary_inputs(
    rows: int, heads: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """query [T, H, d], key [T, H / 2, d], cos, sin [T, d]."""
    query, key = randoms((rows, heads, width), (rows, heads // 2, width), dtype=dtype, device=device)
    angle = torch.outer(torch.arange(rows) % 37, 10000.0 ** -torch.linspace(0, 1, width // 2 + 1)[:-1])
    angle = torch.cat([angle, angle], dim=-1)
    return query, key, angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def transformers_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' `apply_rotary_pos_emb`."""
    return _turned(query, cos, sin), _turned(key, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
        name="layer_norm",
        make_inputs=norm_inputs,
        spec=norm,
        contenders={
            "transformers": transformers_norm,
            "torch.rms_norm": torch_norm,
            "compile": Compiled(transformers_norm),
            "native": partial(rms_norm, epsilon=EPSILON, backend="native"),
            "triton": partial(rms_norm, epsilon=EPSILON, backend="triton"),
            "Liger": liger_norm,
        },
        shapes=GPU_NORM,
        quick_shapes=WIDE,
        bytes=lambda rows, width, element: 5 * rows * width * element,  # x, y; dy, x, dx
    ),
    Row(
        name="layer_swiglu",
        make_inputs=swiglu_inputs,
        spec=transformers_swiglu,
        contenders={
            "transformers": transformers_swiglu,
            "compile": Compiled(transformers_swiglu),
            "native": partial(swiglu, backend="native"),
            "triton": partial(swiglu, backend="triton"),
        },
        shapes=GPU_GATED,
        quick_shapes={name: (rows, 2 * width) for name, (rows, width) in WIDE.items()},
        bytes=lambda rows, width, element: 8 * rows * width * element,  # gate, up, y; dy, gate, up and two gradients
    ),
    Row(
        name="layer_rotary",
        make_inputs=rotary_inputs,
        spec=transformers_rotary,
        contenders={
            "transformers": transformers_rotary,
            "compile": Compiled(transformers_rotary),
            "native": partial(rotary, backend="native"),
            "triton": partial(rotary, backend="triton"),
        },
        shapes=GPU_HEADS,
        quick_shapes=HEADS,
        differentiable=(0, 1),
        # each head read and written, forward and backward; half of the angles, as both halves are alike
        bytes=lambda rows, heads, width, element: (4 * (heads + heads // 2) + 2) * rows * width * element,
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
