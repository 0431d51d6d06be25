"""Discounted sums from the right inside packed sequences: the recurrence under GAE, returns and credit assignment.

y[t] = x[t] + decay[t] y[t + 1],    y past the end of a sequence is 0
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_shapes

IMPLEMENTATIONS = Implementations(op="reverse_scan", native="fastrl::reverse_scan")

Scan = Callable[[Tensor, Tensor, Tensor], Tensor]


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

    Cost: torch makes log2(T) passes over [T] and no host sync; native one pass, accumulating in f64.

    Source: Blelloch 1990, "Prefix sums and their applications", sec. 1.4 (a scan of affine maps).
    """
    check_shapes("x[T] decay[T]", {"x": x, "decay": decay})
    check_borders(cu_seqlens, x)
    if x.dtype not in (torch.float32, torch.float64) or decay.dtype != x.dtype:
        raise ValueError(f"x and decay must both be float32 or float64, got {x.dtype} and {decay.dtype}")
    chosen = choose(backend, x, IMPLEMENTATIONS)
    if chosen == "reference":
        return reference(x, decay, cu_seqlens)
    y: Tensor = _ReverseScan.apply(x, decay, cu_seqlens, native if chosen == "native" else doubling)
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
    y: Tensor = torch.ops.fastrl.reverse_scan(x.contiguous(), decay.contiguous(), cu_seqlens.long())
    return y


class _ReverseScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor, cu_seqlens: Tensor, scan: Scan) -> Tensor:
        y = scan(x, decay, cu_seqlens)
        ctx.save_for_backward(decay, cu_seqlens, y)
        ctx.scan = scan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        decay, cu_seqlens, y = ctx.saved_tensors
        # Read from the right, the left-to-right scan is a reverse scan again.
        mirrored = decay.numel() - cu_seqlens.flip(0)
        dx = ctx.scan(dy.flip(0), decay.roll(1).flip(0), mirrored).flip(0)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        following = y.roll(-1)
        if y.numel():
            following[cu_seqlens[1:].long() - 1] = 0.0  # -1 (an empty first sequence) is the last token: also an end
        return dx, dx * following, None, None
