"""Norm, feed-forward product and rotation of Llama-like layers, each one pass each way in place of five to ten.

    rms_norm  y = x / sqrt(mean(x^2) + epsilon) w
    swiglu    y = silu(gate) up
    rotary    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of a head

`rms_norm`, `swiglu` and `rotary` choose a backend at every call, as all ops do. Modules, which run a hundred times a
step, choose once and call the functions of `layers(backend)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_shapes
from fastrl.ops.first_order import first_order

KERNELS = "fastrl.kernels.layers"
OPERATORS = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotary")  # of fastrl._C
DTYPES = {"native": (torch.float32,), "triton": (torch.bfloat16, torch.float16, torch.float32)}
RMS_NORM, SWIGLU, ROTARY = (
    Implementations(op=op, triton=KERNELS, native=f"fastrl::{op}") for op in ("rms_norm", "swiglu", "rotary")
)


class Layers(NamedTuple):
    """The forward and backward passes of one backend, on contiguous tensors of one type."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]  # x, weight, epsilon -> y, 1 / root
    # dy, x, weight, 1 / root, whether d weight is wanted -> dx, d weight
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    swiglu: Callable[[Tensor, Tensor], Tensor]  # gate, up -> y
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # dy, gate, up -> d gate, d up
    # query, key, cos, sin, whether to turn back -> query, key
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float, backend: str | None = None) -> Tensor:
    """Divide each row by its root mean square.

        y = x r w,    r = 1 / sqrt(mean(x^2) + epsilon)

    Args:
        x: [..., D] of any floating type; differentiable.
        weight: [D] of the same type; differentiable.
        epsilon: added to the mean square.
        backend: see `fastrl.ops.backend.choose`. native is for float32, triton for bfloat16, float16 and float32.

    Returns:
        [..., D] of x's type; statistics and products in f32, rounded once.

    Gradient: dx = r (g w - x r^2 mean(g w x)),  dw = sum over rows of g x r, in f32 and in the same order every time.

    Raises:
        ValueError: shapes or types that do not fit.

    Cost: reads x and writes y; backward reads g and x and writes dx.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    check_shapes("weight[D]", {"weight": weight})
    if x.dim() < 1 or x.shape[-1] != weight.shape[0] or x.dtype != weight.dtype:
        raise ValueError(
            f"x must be [..., D] with D={weight.shape[0]} and of {weight.dtype} as weight, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    chosen = _chosen(backend, x, RMS_NORM)
    if chosen in DTYPES:
        return normed(x, weight, epsilon, layers(chosen))
    wide = _wide(x)
    return (_wide(weight) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon))).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """The product inside a feed-forward layer.

        y = silu(gate) up,    silu(a) = a / (1 + exp(-a))

    Args:
        gate, up: of one shape and floating type; differentiable.
        backend: as in `rms_norm`.

    Returns:
        y alike; computed in f32, rounded once.

    Gradient: d gate = g up s (1 + gate (1 - s)), d up = g gate s, with the sigmoid s computed again.

    Raises:
        ValueError: shapes or types that do not fit.

    Cost: reads both and writes y; backward reads three and writes two. gate and up are kept, and nothing else.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"up must be {tuple(gate.shape)} {gate.dtype} as gate, got {tuple(up.shape)} {up.dtype}")
    chosen = _chosen(backend, gate, SWIGLU)
    if chosen in DTYPES:
        return gated(gate, up, layers(chosen))
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Turn pairs of numbers of each head by the angles of its position.

        (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin),    x1 and x2 the halves of a head

    Args:
        query: [T, H, d] of a floating type, d even; differentiable.
        key: [T, K, d] likewise.
        cos, sin: [T, d] likewise, both halves alike; constant.
        backend: as in `rms_norm`.

    Returns:
        query and key, turned; computed in f32, rounded once.

    Gradient: turned back by the same angles.

    Raises:
        ValueError: shapes or types that do not fit.

    Cost: reads and writes query and key; nothing but the angles is kept.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    check_shapes("query[T,H,d] key[T,K,d] cos[T,d] sin[T,d]", {"query": query, "key": key, "cos": cos, "sin": sin})
    if query.shape[2] % 2 or len({x.dtype for x in (query, key, cos, sin)}) > 1:
        found = f"d={query.shape[2]} and {', '.join(str(x.dtype) for x in (query, key, cos, sin))}"
        raise ValueError(f"query, key, cos and sin must be of one type and of an even d, got {found}")
    chosen = _chosen(backend, query, ROTARY)
    if chosen in DTYPES:
        return turned(query, key, cos, sin, layers(chosen))
    return _turned(query, cos, sin), _turned(key, cos, sin)


def normed(x: Tensor, weight: Tensor, epsilon: float, backend: Layers) -> Tensor:
    """`rms_norm` by a backend that was chosen and arguments that fit."""
    y: Tensor = _RMSNorm.apply(x, weight, epsilon, backend)
    return y


def gated(gate: Tensor, up: Tensor, backend: Layers) -> Tensor:
    """`swiglu` by a backend that was chosen and arguments that fit."""
    y: Tensor = _SwiGLU.apply(gate, up, backend)
    return y


def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backend: Layers) -> tuple[Tensor, Tensor]:
    """`rotary` by a backend that was chosen and arguments that fit."""
    pair: tuple[Tensor, Tensor] = _Rotary.apply(query, key, cos, sin, backend)
    return pair


@cache
def layers(backend: str) -> Layers:
    """The passes of "native" or "triton", which `choose` has found to exist here."""
    if backend == "triton":
        kernels = import_module(KERNELS)
        return Layers(
            kernels.rms_norm, kernels.rms_norm_backward, kernels.swiglu, kernels.swiglu_backward, kernels.rotary
        )
    ops = torch.ops.fastrl
    return Layers(
        ops.rms_norm,
        lambda dy, x, weight, scale, _: ops.rms_norm_backward(dy, x, weight, scale),
        lambda gate, up: ops.swiglu(*(x.view(-1, x.shape[-1]) for x in (gate, up))).view_as(gate),
        ops.swiglu_backward,
        lambda query, key, cos, sin, back: (ops.rotary(query, cos, sin, back), ops.rotary(key, cos, sin, back)),
    )


def _chosen(backend: str | None, x: Tensor, implementations: Implementations) -> str:
    """`choose`, for a type the backend knows."""
    chosen = choose(backend, x, implementations)
    if x.dtype in DTYPES.get(chosen, (x.dtype,)):
        return chosen
    if backend is None:
        return "torch"
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[chosen])
    raise RuntimeError(f"backend {chosen!r} of {implementations.op} is for {known}, got {x.dtype}; use 'torch'")


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _wide(x).chunk(2, dim=-1)
    crossed = torch.cat([-second, first], dim=-1)
    return (_wide(x) * _wide(cos)[:, None] + crossed * _wide(sin)[:, None]).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, backend: Layers) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = backend.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        ctx.backend = backend
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        passes: Layers = ctx.backend
        x, weight, scale = ctx.saved_tensors
        dx, dweight = passes.rms_norm_backward(grad.contiguous(), x, weight, scale, ctx.needs_input_grad[1])
        return dx, dweight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: Layers) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return backend.swiglu(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        passes: Layers = ctx.backend
        return *passes.swiglu_backward(grad.contiguous(), *ctx.saved_tensors), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backend: Layers
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        return backend.rotary(query.contiguous(), key.contiguous(), cos, sin, False)

    @staticmethod
    @first_order
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        passes: Layers = ctx.backend
        cos, sin = ctx.saved_tensors
        back = passes.rotary(query.contiguous(), key.contiguous(), cos, sin, True)
        return *back, None, None, None
