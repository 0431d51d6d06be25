"""The scan y[t] = x[t] + decay[t] y[t + 1] of packed sequences and its gradient, one pass each.

One program walks one sequence block by block, from the right (gradient: from the left), and carries one number. A
block is an associative scan of affine maps (a, b): y -> b + a y, in f64, so that nothing is lost however long
the sequence; results are rounded once. The order of sums depends on the sequence alone, not on its place in the batch.

    dx[t] = dy[t] + decay[t - 1] dx[t - 1],    ddecay[t] = dx[t] y[t + 1]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = ((1024, 8), (512, 4), (256, 4))  # tokens and warps per program; the first is the default
SMALL_BLOCKS = (16, 128)  # for batches this short
ROUNDING = {"enable_fp_fusion": True}  # b + a y is rounded once


def forward(x: Tensor, decay: Tensor, cu_seqlens: Tensor, *, tile: tuple[int, int] = TILES[0]) -> Tensor:
    """x, decay [T] f32 or f64, cu_seqlens [S + 1] -> y [T] of x's type."""
    assert all(tensor.is_contiguous() for tensor in (x, decay, cu_seqlens))
    assert x.dtype == decay.dtype
    y = torch.empty_like(x)
    block, num_warps = fitted(tile, x.numel())
    if x.numel():
        with torch.cuda.device_of(x):
            _from_right[(cu_seqlens.numel() - 1,)](
                x, decay, cu_seqlens, y, BLOCK=block, num_warps=num_warps, **ROUNDING
            )
    return y


def backward(
    dy: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor,
    y: Tensor,
    needs_decay: bool,
    *,
    tile: tuple[int, int] = TILES[0],
) -> tuple[Tensor, Tensor | None]:
    """dy, decay, y [T], cu_seqlens [S + 1] -> dx [T], ddecay [T] or None."""
    assert all(tensor.is_contiguous() for tensor in (dy, decay, cu_seqlens, y))
    dx = torch.empty_like(dy)
    ddecay = torch.empty_like(dy) if needs_decay else None
    block, num_warps = fitted(tile, dy.numel())
    if dy.numel():
        with torch.cuda.device_of(dy):
            _from_left[(cu_seqlens.numel() - 1,)](
                dy, decay, y, cu_seqlens, dx, ddecay, BLOCK=block, num_warps=num_warps, **ROUNDING
            )
    return dx, ddecay


def fitted(tile: tuple[int, int], total: int) -> tuple[int, int]:
    """The tile, narrower where the whole batch fits into less."""
    return next((block for block in SMALL_BLOCKS if total <= block < tile[0]), tile[0]), tile[1]


@triton.jit
def _from_right(x_ptr, decay_ptr, cu_seqlens_ptr, y_ptr, BLOCK: tl.constexpr):
    """One program per sequence; blocks are counted from its end."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    carried = tl.zeros((), tl.float64)
    for done in range(0, end - start, BLOCK):
        token = end - done - BLOCK + lane
        inside = token >= start
        b = tl.load(x_ptr + token, mask=inside, other=0.0).to(tl.float64)
        # The factor of the last token is never read: it may be NaN.
        a = tl.load(decay_ptr + token, mask=inside & (token < end - 1), other=0.0).to(tl.float64)
        a, b = tl.associative_scan((a, b), 0, _after, reverse=True)
        y = b + a * carried
        tl.store(y_ptr + token, y.to(y_ptr.dtype.element_ty), mask=inside)
        carried = tl.sum(tl.where(lane == 0, y, 0.0))


@triton.jit
def _from_left(dy_ptr, decay_ptr, y_ptr, cu_seqlens_ptr, dx_ptr, ddecay_ptr, BLOCK: tl.constexpr):
    """One program per sequence; ddecay_ptr may be None."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    carried = tl.zeros((), tl.float64)
    for done in range(0, end - start, BLOCK):
        token = start + done + lane
        inside = token < end
        b = tl.load(dy_ptr + token, mask=inside, other=0.0).to(tl.float64)
        a = tl.load(decay_ptr + token - 1, mask=inside & (token > start), other=0.0).to(tl.float64)
        a, b = tl.associative_scan((a, b), 0, _after)
        dx = b + a * carried
        tl.store(dx_ptr + token, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if ddecay_ptr is not None:
            following = tl.load(y_ptr + token + 1, mask=token < end - 1, other=0.0).to(tl.float64)
            # Not 0 * following where there is none: dx may be infinite.
            ddecay = tl.where(token < end - 1, dx * following, 0.0)
            tl.store(ddecay_ptr + token, ddecay.to(ddecay_ptr.dtype.element_ty), mask=inside)
        carried = tl.sum(tl.where(lane == BLOCK - 1, dx, 0.0))


@triton.jit
def _after(a_first, b_first, a, b):
    """The map (a, b) applied to the result of the map scanned before it."""
    return a * a_first, b + a * b_first


def _audited(kernel, number: str, index: str, tile: tuple[int, int], **constexprs) -> dict:
    signature = {name: f"*{number}" for name in kernel.arg_names if name.endswith("_ptr")}
    signature |= {"cu_seqlens_ptr": f"*{index}"} | dict.fromkeys((*constexprs, "BLOCK"), "constexpr")
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs | {"BLOCK": tile[0]},
        "num_warps": tile[1],
        "num_stages": 3,
        "options": ROUNDING,
    }


# Every tile with int32 borders, the default with int64; `fitted` makes the small ones.
LAUNCHED = tuple(("i32", tile) for tile in (*TILES, *((block, TILES[0][1]) for block in SMALL_BLOCKS)))
LAUNCHED += (("i64", TILES[0]),)

AUDIT = tuple(
    _audited(kernel, number, index, tile, **constexprs)
    for kernel, constexprs in ((_from_right, {}), (_from_left, {}), (_from_left, {"ddecay_ptr": None}))
    for number in ("fp32", "fp64")
    for index, tile in LAUNCHED
)
