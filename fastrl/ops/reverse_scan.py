"""Discounted sums from the right inside packed sequences: the recurrence under GAE, returns and credit assignment.

y[t] = x[t] + decay[t] y[t + 1],    y past the end of a sequence is 0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_shapes
from fastrl.ops.first_order import first_order

IMPLEMENTATIONS = Implementations(
    op="reverse_scan", triton="fastrl.kernels.reverse_scan", native="fastrl::reverse_scan"
)


class Pair(NamedTuple):
    """One backend."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]  # x, decay, cu_seqlens -> y
    # dy, decay, cu_seqlens, y, whether ddecay is wanted -> dx, ddecay
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def reverse_scan(x: Tensor, decay: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """Sum each sequence from the right, multiplying what is carried by one factor per step.

        y[t] = x[t] + decay[t] y[t + 1]

    Args:
        x: [T] f32 or f64; differentiable.
        decay: [T] factor that multiplies y[t + 1], same type as x; differentiable. The one at the last token of
            a sequence has nothing to multiply and is never read.
        cu_seqlens: [S + 1] int32 or int64, the borders of the sequences, from 0 to T; empty sequences are allowed.
        backend: see `fastrl.ops.backend.choose`.

    Returns:
        [T] y, of x's type.

    Gradient: the same scan from the left with the decays moved by one,
        dx[t] = dy[t] + decay[t - 1] dx[t - 1],    ddecay[t] = dx[t] y[t + 1].

    Raises:
        ValueError: shapes or types that do not fit; on CPU also borders that do not run from 0 to T.

    Cost: torch makes log2(T) passes over [T] and no host sync; native and triton one pass, accumulating in
        f64.

    Source: Blelloch 1990, "Prefix sums and their applications", sec. 1.4 (a scan of affine maps).
    """
    check_shapes("x[T] decay[T]", {"x": x, "decay": decay})
    check_borders(cu_seqlens, x)
    if x.dtype not in (torch.float32, torch.float64) or decay.dtype != x.dtype:
        raise ValueError(f"x and decay must both be float32 or float64, got {x.dtype} and {decay.dtype}")
    chosen = choose(backend, x, IMPLEMENTATIONS)
    if chosen == "reference":
        return reference(x, decay, cu_seqlens)
    y: Tensor = _ReverseScan.apply(x, decay, cu_seqlens, _pair(chosen))
    return y


def check_borders(cu_seqlens: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless cu_seqlens cuts tokens [T]; on a GPU its numbers are not read, that would stall it."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be [S + 1] int32 or int64, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and the tokens on {tokens.device}: move one with .to()")
    if cu_seqlens.device.type != "cpu":
        return
    total = tokens.numel()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to T={total}, got {cu_seqlens.tolist()}")


def reference(x: Tensor, decay: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The recurrence, token by token."""
    borders = cu_seqlens.tolist()
    y: list[Tensor] = []
    for start, end in pairwise(borders):
        reversed_part: list[Tensor] = []
        for t in reversed(range(start, end)):
            reversed_part.append(x[t] + decay[t] * reversed_part[-1] if reversed_part else x[t])
        y.extend(reversed(reversed_part))
    return torch.stack(y) if y else x.clone()


def doubling(x: Tensor, decay: Tensor, cu_seqlens: Tensor) -> Tensor:
    """log2(T) passes: after the pass with stride k, y[t] holds the terms of the 2k tokens from t on."""
    total = x.numel()
    index = torch.arange(total, device=x.device)
    # The first border right of t; with `right=True` empty sequences have no token to confuse.
    end = cu_seqlens[torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True)]
    left = end - index  # tokens of the sequence from t on
    y, carried = x, decay
    stride = 1
    while stride < total:
        inside = left[:-stride] > stride
        step = torch.where(inside, carried[:-stride] * y[stride:], 0.0)
        y = torch.cat([y[:-stride] + step, y[-stride:]])
        # Past the end this is a product nobody reads: `inside` is false for every longer stride too.
        carried = torch.cat([carried[:-stride] * carried[stride:], carried[-stride:]])
        stride *= 2
    return y


def native(x: Tensor, decay: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One pass in C++; sequences run in parallel."""
    y: Tensor = torch.ops.fastrl.reverse_scan(x, decay, cu_seqlens.long())
    return y


def mirrored(
    scan: Callable[[Tensor, Tensor, Tensor], Tensor],
    dy: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor,
    y: Tensor,
    needs_decay: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient by the same scan: read from the right, the left-to-right scan is a reverse scan again."""
    borders = decay.numel() - cu_seqlens.flip(0)
    dx = scan(dy.flip(0), decay.roll(1).flip(0), borders).flip(0)
    if not needs_decay:
        return dx, None
    following = y.roll(-1)
    if y.numel():
        following[cu_seqlens[1:].long() - 1] = 0.0  # -1 (an empty first sequence) is the last token: also an end
    return dx, dx * following


def _pair(backend: str) -> Pair:
    if backend == "triton":
        from fastrl.kernels import reverse_scan as kernel

        return Pair(kernel.forward, kernel.backward)
    scan = native if backend == "native" else doubling
    return Pair(scan, partial(mirrored, scan))


class _ReverseScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor, cu_seqlens: Tensor, pair: Pair) -> Tensor:
        x, decay, cu_seqlens = x.contiguous(), decay.contiguous(), cu_seqlens.contiguous()
        y = pair.forward(x, decay, cu_seqlens)
        ctx.save_for_backward(decay, cu_seqlens, y)
        ctx.backward_scan = pair.backward
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        dx, ddecay = ctx.backward_scan(dy.contiguous(), *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx, ddecay, None, None
