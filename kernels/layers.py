"""Norms, feed-forward products and rotations of Llama-like layers: one kernel each way, and one that sums d weight.

    norm     y = x r w,  r = 1 / sqrt(mean(x^2) + epsilon)
             dx = r (g w - x r^2 mean(g w x)),   dw = sum over rows of g x r
    swiglu   y = a s b,  s = 1 / (1 + exp(-a));   da = g b s (1 + a (1 - s)),   db = g a s
    rotary   (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin), halves of a head; its transpose turns by the other sign

Numbers of any type are computed with in f32, and each result is rounded once. dw is summed over spans of rows, then
over the spans in their order: a machine gives the same bits every time. A row wider than a program's block is read in
blocks; one that fits comes from the cache when it is read again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.tuning import MACHINES, ROUNDING, architecture, audited

ELEMENTS = 2048  # of a program's block: as many rows as they take
WIDEST, CUT = 8192, 4096  # a row that is wider than the first is cut into blocks of the second
ELEMENTS_PER_WARP, FEWEST_WARPS = 512, 4
SPANS_PER_PROGRAM = 2  # d weight: programs per place on the device, so that some load while others add
SUM_PARTS, SUM_COLUMNS = 64, 32  # block of the second stage
SWIGLU_BLOCK, SWIGLU_WARPS = 2048, 4
ROTARY_ELEMENTS, ROTARY_WARPS = 1024, 4  # pairs of numbers a program turns at a time


class RowsTile(NamedTuple):
    """Rows and columns of a norm that a program works on at a time, and its warps."""

    rows: int
    block_d: int
    num_warps: int


def rows_tile(width: int) -> RowsTile:
    """The tile for rows of that width: several narrow ones, such as heads, or a part of a wide one."""
    if width > WIDEST:
        return RowsTile(1, CUT, 2 * CUT // ELEMENTS_PER_WARP)  # with half as many warps it spills
    block = max(16, triton.next_power_of_2(width))
    return RowsTile(max(1, ELEMENTS // block), block, max(FEWEST_WARPS, block // ELEMENTS_PER_WARP))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, tile: RowsTile | None = None) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [D] of one type -> y [..., D] of that type, r [rows] f32."""
    assert x.is_contiguous()
    assert weight.is_contiguous()
    d = weight.numel()
    rows = x.numel() // d
    y, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = tile or rows_tile(d)
    if rows:
        with torch.cuda.device_of(x):
            _norm[(triton.cdiv(rows, tile.rows),)](
                x,
                weight,
                y,
                scale,
                rows,
                d,
                EPSILON=epsilon,
                ROWS=tile.rows,
                BLOCK_D=tile.block_d,
                num_warps=tile.num_warps,
                **ROUNDING,
            )
    return y, scale


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs_weight: bool, *, tile: RowsTile | None = None
) -> tuple[Tensor, Tensor | None]:
    """dy, x [..., D], weight [D], r [rows] -> dx [..., D], dw [D] or None."""
    assert all(each.is_contiguous() for each in (dy, x, weight, scale))
    assert dy.shape == x.shape
    assert dy.dtype == x.dtype
    d, rows = weight.numel(), scale.numel()
    dx = torch.empty_like(x)
    if not rows:
        return dx, torch.zeros_like(weight) if needs_weight else None
    tile = tile or rows_tile(d)
    places = SPANS_PER_PROGRAM * MACHINES[architecture(x.device)].programs
    tiles = triton.cdiv(triton.cdiv(rows, tile.rows), places)  # of a span
    spans, blocks = triton.cdiv(rows, tiles * tile.rows), triton.cdiv(d, tile.block_d)
    partial = torch.empty(spans, d, dtype=torch.float32, device=x.device) if needs_weight else None
    dweight = torch.empty_like(weight) if needs_weight else None
    with torch.cuda.device_of(x):
        _norm_backward[(spans * blocks,)](
            dy,
            x,
            weight,
            scale,
            dx,
            partial,
            rows,
            d,
            tiles,
            blocks,
            IS_WHOLE=blocks == 1,
            ROWS=tile.rows,
            BLOCK_D=tile.block_d,
            num_warps=tile.num_warps,
            **ROUNDING,
        )
        if needs_weight:
            _sum_parts[(triton.cdiv(d, SUM_COLUMNS),)](
                partial, dweight, spans, d, PARTS=SUM_PARTS, COLUMNS=SUM_COLUMNS, num_warps=FEWEST_WARPS, **ROUNDING
            )
    return dx, dweight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up of one shape and type -> y, alike."""
    assert gate.is_contiguous()
    assert up.is_contiguous()
    y = torch.empty_like(gate)
    n = gate.numel()
    if n:
        with torch.cuda.device_of(gate):
            _swiglu[(triton.cdiv(n, SWIGLU_BLOCK),)](
                gate, up, y, n, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS, **ROUNDING
            )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dy, gate, up of one shape and type -> da, db, alike."""
    assert all(each.is_contiguous() for each in (dy, gate, up))
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    n = gate.numel()
    if n:
        with torch.cuda.device_of(gate):
            _swiglu_backward[(triton.cdiv(n, SWIGLU_BLOCK),)](
                dy, gate, up, dgate, dup, n, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS, **ROUNDING
            )
    return dgate, dup


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_backward: bool) -> tuple[Tensor, Tensor]:
    """query [T, H, d], key [T, K, d], cos, sin [T, d] with both halves alike -> both turned, or turned back."""
    assert all(each.is_contiguous() for each in (query, key, cos, sin))
    assert cos.shape == sin.shape == (query.shape[0], query.shape[2])
    assert key.shape[::2] == query.shape[::2]
    turned = torch.empty_like(query), torch.empty_like(key)
    half = query.shape[2] // 2
    block = rotary_block(half)
    if query.shape[0]:
        with torch.cuda.device_of(query):
            _rotary[(query.shape[0],)](
                query,
                key,
                cos,
                sin,
                *turned,
                query.shape[1],
                key.shape[1],
                half,
                SIGN=-1.0 if is_backward else 1.0,
                HEADS=max(1, ROTARY_ELEMENTS // block),
                BLOCK=block,
                num_warps=ROTARY_WARPS,
                **ROUNDING,
            )
    return turned


def rotary_block(half: int) -> int:
    """Columns of a program's block for half a head."""
    return max(16, triton.next_power_of_2(half))


@triton.jit
def _norm(x_ptr, weight_ptr, y_ptr, scale_ptr, N, D, EPSILON: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program per ROWS rows: the mean square over D, then the result."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D)
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        x = _block(x_ptr, row, first + lane, N, D)
        squares += x * x
    scale = 1.0 / tl.sqrt(tl.sum(squares, 1) / D + EPSILON)
    tl.store(scale_ptr + row, scale, mask=row < N)
    for first in range(0, D, BLOCK_D):
        column = first + lane
        y = _block(x_ptr, row, column, N, D) * scale[:, None] * _columns(weight_ptr, column, D)
        _store(y_ptr, row, column, N, D, y)


@triton.jit
def _norm_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    dx_ptr,
    partial_ptr,
    N,
    D,
    tiles,
    blocks,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per span of rows and block of columns, the blocks of a span side by side.

    IS_WHOLE: a block holds the row. partial_ptr may be None.
    """
    program = tl.program_id(0).to(tl.int64)
    span = program // blocks
    lane = tl.arange(0, BLOCK_D)
    own = (program % blocks).to(tl.int32) * BLOCK_D + lane
    weight = _columns(weight_ptr, own, D)
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for k in range(tiles):
        row = (span * tiles + k) * ROWS + tl.arange(0, ROWS)
        scale = tl.load(scale_ptr + row, mask=row < N, other=0.0)
        dy = _block(dy_ptr, row, own, N, D)
        x = _block(x_ptr, row, own, N, D)
        g = dy * weight
        products = g * x
        if not IS_WHOLE:
            products = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for first in range(0, D, BLOCK_D):
                column = first + lane
                every = _block(dy_ptr, row, column, N, D) * _columns(weight_ptr, column, D)
                products += every * _block(x_ptr, row, column, N, D)
        share = tl.sum(products, 1) * scale * scale / D
        _store(dx_ptr, row, own, N, D, scale[:, None] * (g - x * share[:, None]))
        dweight += dy * (x * scale[:, None])
    if partial_ptr is not None:
        tl.store(partial_ptr + span * D + own, tl.sum(dweight, 0), mask=own < D)


@triton.jit
def _sum_parts(partial_ptr, sum_ptr, N, D, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per block of columns of partial [N, D]; always the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, N, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        total += _block(partial_ptr, part, column, N, D)
    tl.store(sum_ptr + column, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _swiglu(gate_ptr, up_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """One program per BLOCK numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + place, mask=place < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=place < N, other=0.0).to(tl.float32)
    s, _ = _sigmoids(gate)
    tl.store(y_ptr + place, (gate * s * up).to(y_ptr.dtype.element_ty), mask=place < N)


@triton.jit
def _swiglu_backward(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, BLOCK: tl.constexpr):
    """One program per BLOCK numbers; the sigmoid is computed again."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + place, mask=place < N, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + place, mask=place < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=place < N, other=0.0).to(tl.float32)
    s, rest = _sigmoids(gate)
    tl.store(dgate_ptr + place, (dy * up * s * (1.0 + gate * rest)).to(dgate_ptr.dtype.element_ty), mask=place < N)
    tl.store(dup_ptr + place, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=place < N)


@triton.jit
def _sigmoids(x):
    """1 / (1 + exp(-x)) and 1 less that, without an exponential that overflows or a difference that cancels."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    return tl.where(x < 0, small * large, large), tl.where(x < 0, large, small * large)


@triton.jit
def _rotary(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    query_heads,
    key_heads,
    half,
    SIGN: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token: its angles once, then all heads of query and key."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + token * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)
    sin = SIGN * tl.load(sin_ptr + token * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)
    _turn(query_ptr, query_out_ptr, token, query_heads, half, cos, sin, HEADS, BLOCK)
    _turn(key_ptr, key_out_ptr, token, key_heads, half, cos, sin, HEADS, BLOCK)


@triton.jit
def _turn(x_ptr, y_ptr, token, heads, half, cos, sin, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """(x1 cos - x2 sin, x2 cos + x1 sin) for the heads of one token."""
    column = tl.arange(0, BLOCK)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (column < half)
        place = (token * heads + head) * 2 * half + column
        one = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(x_ptr + place + half, mask=inside, other=0.0).to(tl.float32)
        kind = y_ptr.dtype.element_ty
        tl.store(y_ptr + place, (one * cos[None, :] - two * sin[None, :]).to(kind), mask=inside)
        tl.store(y_ptr + place + half, (two * cos[None, :] + one * sin[None, :]).to(kind), mask=inside)


@triton.jit
def _block(ptr, row, column, N, D):
    """Rows and columns of an [N, D] matrix in f32; 0 outside."""
    inside = (row < N)[:, None] & (column < D)[None, :]
    return tl.load(ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _columns(ptr, column, D):
    """Columns of a vector in f32, as one row."""
    return tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(ptr, row, column, N, D, value):
    inside = (row < N)[:, None] & (column < D)[None, :]
    tl.store(ptr + row[:, None] * D + column[None, :], value.to(ptr.dtype.element_ty), mask=inside)


def _audited_norm(number: str, width: int) -> tuple[dict, ...]:
    """Forward, backward, and backward without d weight; a width that 16 divides, as all models' but tests'."""
    tile = rows_tile(width)
    kind = f"*{number}"
    types = {"x_ptr": kind, "weight_ptr": kind, "y_ptr": kind, "dy_ptr": kind, "dx_ptr": kind, "D": "i32:16"}
    sizes = {"ROWS": tile.rows, "BLOCK_D": tile.block_d}
    return (
        audited(_norm, types, sizes | {"EPSILON": 1e-6}, tile.num_warps, 3),
        *(
            audited(_norm_backward, types, sizes | {"IS_WHOLE": width <= WIDEST, "partial_ptr": x}, tile.num_warps, 3)
            for x in ("*", None)
        ),
    )


def _audited_columns(number: str, divisible: str) -> tuple[dict, ...]:
    """What works on one number after the other, and the second stage of d weight."""
    names = ("sum", "gate", "up", "y", "dy", "dgate", "dup")
    types = {f"{name}_ptr": f"*{number}" for name in names} | {"N": f"i32{divisible}"}
    sums = {"PARTS": SUM_PARTS, "COLUMNS": SUM_COLUMNS}
    return (
        audited(_sum_parts, types, sums, FEWEST_WARPS, 3),
        *(audited(x, types, {"BLOCK": SWIGLU_BLOCK}, SWIGLU_WARPS, 3) for x in (_swiglu, _swiglu_backward)),
    )


def _audited_rotary(number: str, half: int) -> dict:
    block = rotary_block(half)
    names = ("query", "key", "cos", "sin", "query_out", "key_out")
    sizes = {"SIGN": 1.0, "HEADS": max(1, ROTARY_ELEMENTS // block), "BLOCK": block}
    types = {f"{name}_ptr": f"*{number}" for name in names} | {"half": "i32:16"}
    return audited(_rotary, types, sizes, ROTARY_WARPS, 3)


NUMBERS = ("bf16", "fp16", "fp32")
AUDIT = (
    *(
        entry
        for number in NUMBERS
        for width in (64, 128, 1024, 4096, WIDEST, 2 * WIDEST)
        for entry in _audited_norm(number, width)
    ),
    *(entry for number in NUMBERS for divisible in (":16", "") for entry in _audited_columns(number, divisible)),
    *(_audited_rotary(number, half) for number in NUMBERS for half in (32, 64, 128)),
)
