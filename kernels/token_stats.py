"""A row of logits to a few numbers in one read; `token_gradient` is the way back.

With z the mapped logits of a row, m the largest, t its target:

    S = sum_v exp(z_v - m)      W = sum_v exp(z_v - m) (z_v - m)      lse = m + log S
    logprob = z_t - m - log S   entropy = log S - W / S               mean_logit = sum_v z_v / V

Sums (m, S, W) of parts of a row merge exactly like the row itself: a row may be cut into spans, or come tile by tile
out of a product (`linear_stats`); `combined` finishes both. A target below 0 is ignored: its logprob is 0. One past the
vocabulary reads nothing and gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.logit_map import MapArguments, outer_factor, squashed
from fastrl.kernels.tuning import (
    COMBINE,
    ROUNDING,
    ROWS,
    RowTile,
    audited,
    memory_columns,
    row_tile,
    row_tiles,
    spans,
    wide_row_tiles,
)

# Stands for -inf in running maxima: differences of two stay finite. A power of two is the same in f32 and f64.
LOWEST = tl.constexpr(-(2.0**100))
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


def forward(
    raw: Tensor, target: Tensor, logit_map: MapArguments, *, with_mean: bool = False, tile: RowTile | None = None
) -> Tensor:
    """raw [C, V] of any float type, target [C] int64 -> [3 or 4, C] logprob, entropy, lse, mean_logit; f64 for f64."""
    assert raw.stride(1) == 1
    assert target.is_contiguous()
    assert target.dtype == torch.int64
    n, v = raw.shape
    tile = tile or row_tile(raw, ROWS)
    parts = spans(raw, tile)
    dtype = torch.promote_types(raw.dtype, torch.float32)
    partial = torch.empty((4 if with_mean else 3, parts, n), dtype=dtype, device=raw.device)
    taken = torch.empty(n, dtype=dtype, device=raw.device)
    blocks = triton.cdiv(triton.cdiv(v, tile.block_v), parts)
    if n:
        with torch.cuda.device_of(raw):
            _row_partials[(n, parts)](
                raw,
                target,
                logit_map.temperature,
                partial,
                taken,
                raw.stride(0),
                n,
                v,
                memory_columns(raw),
                blocks,
                INNER=logit_map.inner,
                OUTER=logit_map.outer,
                WITH_MEAN=with_mean,
                BLOCK_V=tile.block_v,
                PREFETCH=tile.prefetch,
                num_warps=tile.num_warps,
                **ROUNDING,
            )
    return combined(partial, taken, target, v)


def combined(partial: Tensor, taken: Tensor, target: Tensor, v: int) -> Tensor:
    """partial [3 or 4, parts, C] (m, S, W, sum z), taken [C] target logits, target [C] -> statistics [3 or 4, C]."""
    assert all(x.is_contiguous() for x in (partial, taken, target))
    kinds, parts, n = partial.shape
    stats = torch.empty((kinds, n), dtype=partial.dtype, device=partial.device)
    if n:
        with torch.cuda.device_of(partial):
            _combine[(triton.cdiv(n, COMBINE.rows),)](
                partial,
                taken,
                target,
                stats,
                n,
                parts,
                v,
                WITH_MEAN=kinds == 4,
                BLOCK_N=COMBINE.rows,
                BLOCK_P=COMBINE.parts,
                num_warps=COMBINE.num_warps,
                **ROUNDING,
            )
    return stats


@triton.jit(
    do_not_specialize=["n_rows", "blocks"],
    do_not_specialize_on_alignment=["target_ptr", "temperature_ptr", "taken_ptr"],
)
def _row_partials(
    raw_ptr,
    target_ptr,
    temperature_ptr,
    partial_ptr,
    taken_ptr,
    raw_stride,
    n_rows,
    V,
    columns,
    blocks,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One program per row and span: every lane keeps its own maximum and sums, with one exp per element."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    raw_ptr += row * raw_stride
    outer = outer_factor(temperature_ptr, row, OUTER, dtype)
    lane = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_V], LOWEST, dtype)
    total = tl.zeros([BLOCK_V], dtype)
    weighted = tl.zeros([BLOCK_V], dtype)
    plain = tl.zeros([BLOCK_V], dtype)
    # In blocks, so that the compiler knows what divides it and loads are wide.
    start = part * blocks * BLOCK_V
    for first in tl.range(start, tl.minimum(start + blocks * BLOCK_V, V), BLOCK_V, num_stages=PREFETCH):
        column = first + lane
        inside = column < V
        # `columns` may round V up into a row's padding, so that loads are wide whatever V is.
        raw = tl.load(raw_ptr + column, mask=column < columns, other=0.0).to(dtype)
        z = squashed(raw, INNER) * outer
        if WITH_MEAN:
            plain += tl.where(inside, z, 0.0)
        # Written as a choice, because a maximum would swallow NaN.
        z = tl.where(inside, tl.where(z < LOWEST, LOWEST, z), LOWEST)
        step = z - top
        e = tl.exp(-tl.abs(step))
        rises = step > 0
        weighted = tl.where(rises, e * (weighted - step * total), weighted + e * step)
        total = tl.where(rises, e * total + 1.0, total + e)
        top = tl.where(rises, z, top)
    peak = tl.max(top, 0)
    step = top - peak
    e = tl.exp(step)
    slot = part.to(tl.int64) * n_rows + row
    kind = tl.num_programs(1).to(tl.int64) * n_rows
    tl.store(partial_ptr + slot, peak)
    tl.store(partial_ptr + kind + slot, tl.sum(e * total, 0))
    tl.store(partial_ptr + 2 * kind + slot, tl.sum(e * (weighted + step * total), 0))
    if WITH_MEAN:
        tl.store(partial_ptr + 3 * kind + slot, tl.sum(plain, 0))
    if part == 0:
        target = tl.load(target_ptr + row)
        raw = tl.load(raw_ptr + target, mask=(target >= 0) & (target < V), other=0.0).to(dtype)
        tl.store(taken_ptr + row, squashed(raw, INNER) * outer)


@triton.jit(do_not_specialize=["n_rows", "parts"])
def _combine(
    partial_ptr,
    taken_ptr,
    target_ptr,
    stats_ptr,
    n_rows,
    parts,
    V,
    WITH_MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per BLOCK_N rows merges their parts in a fixed order."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    kind = parts.to(tl.int64) * n_rows
    top = tl.full([BLOCK_P, BLOCK_N], LOWEST, dtype)
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype)
    weighted = tl.zeros([BLOCK_P, BLOCK_N], dtype)
    plain = tl.zeros([BLOCK_P, BLOCK_N], dtype)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < parts)[:, None] & (row < n_rows)[None, :]
        place = partial_ptr + part.to(tl.int64)[:, None] * n_rows + row[None, :]
        other_top = tl.load(place, mask=inside, other=LOWEST)
        other_total = tl.load(place + kind, mask=inside, other=0.0)
        other_weighted = tl.load(place + 2 * kind, mask=inside, other=0.0)
        if WITH_MEAN:
            plain += tl.load(place + 3 * kind, mask=inside, other=0.0)
        peak = tl.maximum(top, other_top)
        step, other_step = top - peak, other_top - peak
        e, other_e = tl.exp(step), tl.exp(other_step)
        weighted = e * (weighted + step * total) + other_e * (other_weighted + other_step * other_total)
        total = e * total + other_e * other_total
        top = peak
    peak = tl.max(top, 0)
    step = top - peak[None, :]
    e = tl.exp(step)
    weighted = tl.sum(e * (weighted + step * total), 0)
    mass = tl.sum(e * total, 0)
    # A row without any finite logit has no distribution; its lse is -inf, unless a NaN is why none is larger.
    total = tl.where(peak > LOWEST, mass, NAN)
    log_total = tl.log(total)
    lse = tl.where((peak <= LOWEST) & (mass == mass), -INFINITY, peak + log_total)
    inside = row < n_rows
    target = tl.load(target_ptr + row, mask=inside, other=-1)
    taken = tl.load(taken_ptr + row, mask=inside & (target >= 0) & (target < V), other=NAN)
    taken = tl.where(taken <= LOWEST, -INFINITY, taken)
    logprob = tl.where(target < 0, 0.0, (taken - peak) - log_total)
    tl.store(stats_ptr + row, logprob, mask=inside)
    tl.store(stats_ptr + n_rows + row, log_total - weighted / total, mask=inside)
    tl.store(stats_ptr + 2 * n_rows + row, lse, mask=inside)
    if WITH_MEAN:
        tl.store(stats_ptr + 3 * n_rows + row, tl.sum(plain, 0) / V, mask=inside)


def _audited_rows(tile: RowTile, targets: tuple[str, ...], number: str, **options: object) -> dict:
    constexprs = {"INNER": 0.0, "OUTER": 1.0, "WITH_MEAN": False, "temperature_ptr": None} | options
    constexprs |= {"BLOCK_V": tile.block_v, "PREFETCH": tile.prefetch}
    types = {"raw_ptr": f"*{number}", "target_ptr": "*i64", "raw_stride": "i32:16", "columns": "i32:16"}
    return audited(_row_partials, types, constexprs, tile.num_warps, 1, targets, wide=number == "fp64")


def _audited_combine(number: str, with_mean: bool) -> dict:
    constexprs = {"WITH_MEAN": with_mean, "BLOCK_N": COMBINE.rows, "BLOCK_P": COMBINE.parts}
    return audited(_combine, {"target_ptr": "*i64"}, constexprs, COMBINE.num_warps, 1, (), wide=number == "fp64")


_EVERY_OPTION = {"INNER": 0.5, "WITH_MEAN": True, "temperature_ptr": "*"}
AUDIT = (
    *(
        _audited_rows(tile, targets, number, **options)
        for number, tiles in (*((x, row_tiles(ROWS)) for x in ("fp32", "bf16", "fp16")), ("fp64", wide_row_tiles(ROWS)))
        for tile, targets in tiles
        for options in ({}, _EVERY_OPTION)
    ),
    *(_audited_combine(number, with_mean) for number in ("fp32", "fp64") for with_mean in (False, True)),
)
