"""d loss / d logits of a row from its statistics and one coefficient for each of them: one read, one write.

    d raw_v = slope_v (p_v (l - a - b (log p_v + entropy)) + s / V),   log p_v = z_v - lse
    d raw_t = slope_t (a (1 - p_t) + p_t (l - b (log p_t + entropy)) + s / V) at the target t

where a, b, l, s are the upstream gradients of logprob, entropy, lse and mean_logit, and slope = d z / d raw. p_t comes
from logprob, so 1 - p_t keeps its digits where p_t is near 1, and it is rounded only as part of the sum. A target below
0, or past the vocabulary, is no column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.logit_map import MapArguments, outer_factor, squashed
from fastrl.kernels.tuning import (
    GRADIENT_ROWS,
    ROUNDING,
    RowTile,
    audited,
    memory_columns,
    row_tile,
    row_tiles,
    wide_row_tiles,
)

# A row's narrower gradient replaces the row where a barrier waits for loads under way: AMD's does not.
CAN_NARROW_IN_PLACE = torch.version.hip is None
LOG_ZERO = tl.constexpr(-1000.0)  # log p below this counts as this, so p log p is 0 and never 0 x -inf


def backward(
    source: Tensor,
    out: Tensor,
    index: Tensor | None,
    target: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    logit_map: MapArguments,
    *,
    is_probability: bool = False,
    tile: RowTile | None = None,
) -> None:
    """Write d loss / d raw of the rows `index` [K] (None: all) of source [C, V] to out [K, V].

    `source` holds raw logits, or with is_probability the softmax that was kept (no cap then, lse unused). `target`,
    `stats` (logprob, entropy, lse), `upstream` (of logprob, entropy, lse, mean_logit; None is 0) and the map's
    temperature are those of the K rows. `out` may be source itself, or, where no index moves rows, a view of a type
    half as wide whose rows start where source's do (`narrowed`): one program owns a row and reads ahead of itself.
    What lies between a row's V columns and the next row's start is padding, and may be written.
    """
    assert source.stride(1) == 1
    assert out.stride(1) == 1
    assert target.is_contiguous()
    assert all(x is None or (x.is_contiguous() and x.dtype == stats[0].dtype) for x in (*stats, *upstream))
    assert logit_map.inner == 0.0 or not is_probability, "a cap's slope needs the raw logits"
    shares_memory = source.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    assert index is None or not shares_memory, "moved rows need memory of their own"
    assert out.dtype == source.dtype or not shares_memory or CAN_NARROW_IN_PLACE
    n, v = out.shape
    tile = tile or row_tile(source, GRADIENT_ROWS)
    if n == 0:
        return
    with torch.cuda.device_of(source):
        _row_gradient[(n,)](
            source,
            out,
            index,
            target,
            *stats,
            *upstream,
            logit_map.temperature,
            source.stride(0),
            out.stride(0),
            v,
            min(memory_columns(source), memory_columns(out)),
            INNER=logit_map.inner,
            OUTER=logit_map.outer,
            IS_PROBABILITY=is_probability,
            IN_PLACE=shares_memory and out.dtype != source.dtype,
            BLOCK_V=tile.block_v,
            PREFETCH=tile.prefetch,
            num_warps=tile.num_warps,
            **ROUNDING,
        )


def narrowed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """A [C, V] view of raw's memory with the narrower `dtype`: each row lies in the first part of raw's row."""
    return raw if raw.dtype == dtype else raw.view(dtype)[:, : raw.shape[1]]


def probability(raw: Tensor, lse: Tensor, out: Tensor, logit_map: MapArguments, *, tile: RowTile | None = None) -> None:
    """Write exp(z - lse) of raw [C, V] to out [C, V], rounded to its type."""
    assert raw.stride(1) == 1
    assert out.is_contiguous()
    assert lse.is_contiguous()
    n, v = raw.shape
    tile = tile or row_tile(raw, GRADIENT_ROWS)
    if n == 0:
        return
    with torch.cuda.device_of(raw):
        _probability[(n, triton.cdiv(v, tile.block_v))](
            raw,
            lse,
            out,
            logit_map.temperature,
            raw.stride(0),
            v,
            INNER=logit_map.inner,
            OUTER=logit_map.outer,
            BLOCK_V=tile.block_v,
            num_warps=tile.num_warps,
            **ROUNDING,
        )


# A row's own numbers lie wherever its chunk begins: where, is no reason to compile again.
_OF_ROWS = ["index_ptr", "target_ptr", "logprob_ptr", "entropy_ptr", "lse_ptr", "temperature_ptr"]
_OF_ROWS += ["d_logprob_ptr", "d_entropy_ptr", "d_lse_ptr", "d_mean_ptr"]


@triton.jit(do_not_specialize_on_alignment=_OF_ROWS)
def _row_gradient(
    source_ptr,
    out_ptr,
    index_ptr,
    target_ptr,
    logprob_ptr,
    entropy_ptr,
    lse_ptr,
    d_logprob_ptr,
    d_entropy_ptr,
    d_lse_ptr,
    d_mean_ptr,
    temperature_ptr,
    source_stride,
    out_stride,
    V,
    columns,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    IS_PROBABILITY: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One program per row; index_ptr, the d_ pointers and temperature_ptr may be None."""
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    place = row if index_ptr is None else tl.load(index_ptr + row)
    source_ptr += place * source_stride
    out_ptr += row * out_stride
    outer = outer_factor(temperature_ptr, row, OUTER, dtype)
    target = tl.load(target_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    lse = tl.load(lse_ptr + row)
    a = _coefficient(d_logprob_ptr, row, dtype)
    a = tl.where(target < 0, 0.0, a)
    b = _coefficient(d_entropy_ptr, row, dtype)
    l = _coefficient(d_lse_ptr, row, dtype)  # noqa: E741
    spread = _coefficient(d_mean_ptr, row, dtype) / V
    at_target = _target_gradient(tl.load(logprob_ptr + row), entropy, a, b, l)
    common = l - a - b * entropy
    lane = tl.arange(0, BLOCK_V)
    for first in tl.range(0, V, BLOCK_V, num_stages=PREFETCH):
        column = first + lane
        inside = column < columns
        source = tl.load(source_ptr + column, mask=inside, other=0.0).to(dtype)
        slope = outer
        if IS_PROBABILITY:
            p = source
            # Where p is 0 its product below is 0 whatever the logarithm.
            logp = tl.log(tl.where(p > 0, p, 1.0))
        else:
            t = squashed(source, INNER)
            logp = t * outer - lse
            p = tl.exp(logp)
            if INNER != 0.0:
                slope = outer * tl.full((), INNER, dtype) * (1.0 - t * t)
        inner = common
        if d_entropy_ptr is not None:
            inner = common - b * tl.where(logp < LOG_ZERO, LOG_ZERO, logp)
        gradient = (tl.where(column == target, at_target, p * inner) + spread) * slope
        if IN_PLACE:
            # A narrower result lands on numbers that other warps may still have to read in this very step.
            tl.debug_barrier()
        tl.store(out_ptr + column, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _coefficient(upstream_ptr, row, dtype: tl.constexpr):
    """A row's upstream gradient, 0 where there is none."""
    value = tl.zeros((), dtype)
    if upstream_ptr is not None:
        value = tl.load(upstream_ptr + row)
    return value


@triton.jit
def _target_gradient(logprob, entropy, a, b, l):  # noqa: E741
    """d loss / d z_t less what every column gets; 1 - exp(x) is a series near 0, where it would cancel."""
    p = tl.exp(logprob)
    x = logprob
    # Divisions by whole numbers: a constant such as 1 / 6 would be rounded to f32 beside f64 numbers.
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    complement = tl.where(x > -0.03125, series, 1.0 - p)
    return a * complement + p * (l - b * (tl.where(logprob < LOG_ZERO, LOG_ZERO, logprob) + entropy))


@triton.jit(do_not_specialize_on_alignment=["lse_ptr", "temperature_ptr"])
def _probability(
    raw_ptr,
    lse_ptr,
    out_ptr,
    temperature_ptr,
    raw_stride,
    V,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row and block of columns."""
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = column < V
    raw = tl.load(raw_ptr + row * raw_stride + column, mask=inside, other=0.0).to(dtype)
    outer = outer_factor(temperature_ptr, row, OUTER, dtype)
    p = tl.exp(squashed(raw, INNER) * outer - tl.load(lse_ptr + row))
    tl.store(out_ptr + row * V + column, p.to(out_ptr.dtype.element_ty), mask=inside)


_ONLY_LOGPROB = dict.fromkeys(("index_ptr", "d_entropy_ptr", "d_lse_ptr", "d_mean_ptr", "temperature_ptr"))
_MAPS = ({"INNER": 0.0, "OUTER": 1.0}, {"INNER": 0.5, "OUTER": 2.0})


def _audited_gradient(
    tile: RowTile, targets: tuple[str, ...], source: str, out: str, in_place: bool, **options: object
) -> dict:
    constexprs = {"IS_PROBABILITY": False, "IN_PLACE": in_place} | options
    constexprs |= {"BLOCK_V": tile.block_v, "PREFETCH": tile.prefetch}
    types = {"source_ptr": f"*{source}", "out_ptr": f"*{out}", "index_ptr": "*i64", "target_ptr": "*i64"}
    types |= {"source_stride": "i32:16", "out_stride": "i32:16", "columns": "i32:16"}
    if in_place:
        targets = tuple(x for x in targets or ("sm_80", "sm_90", "sm_100") if not x.startswith("gfx"))
    return audited(_row_gradient, types, constexprs, tile.num_warps, 1, targets, wide=source == "fp64")


def _audited_probability(tile: RowTile, targets: tuple[str, ...], raw: str, out: str) -> dict:
    constexprs = {"temperature_ptr": None, "INNER": 0.0, "OUTER": 1.0, "BLOCK_V": tile.block_v}
    types = {"raw_ptr": f"*{raw}", "out_ptr": f"*{out}", "raw_stride": "i32:16"}
    return audited(_probability, types, constexprs, tile.num_warps, 1, targets, wide=raw == "fp64")


AUDIT = (
    *(
        _audited_gradient(tile, targets, source, out, in_place, **chosen, **logit_map)
        for source, out, in_place in (
            ("fp32", "bf16", True),
            ("fp32", "bf16", False),
            ("fp32", "fp32", False),
            ("bf16", "bf16", False),
            ("fp16", "fp16", False),
            ("fp64", "fp64", False),
        )
        for tile, targets in (wide_row_tiles(GRADIENT_ROWS) if source == "fp64" else row_tiles(GRADIENT_ROWS))
        for chosen in (_ONLY_LOGPROB, {} if not in_place else {"index_ptr": None})
        for logit_map in _MAPS
    ),
    *(
        _audited_gradient(tile, targets, kept, kept, False, **chosen, **_MAPS[0], IS_PROBABILITY=True)
        for kept in ("fp32", "bf16", "fp64")
        for tile, targets in (wide_row_tiles(GRADIENT_ROWS) if kept == "fp64" else row_tiles(GRADIENT_ROWS))
        for chosen in (_ONLY_LOGPROB, {})
    ),
    *(
        _audited_probability(tile, targets, raw, out)
        for raw, out in (("fp32", "bf16"), ("fp32", "fp32"), ("fp64", "fp64"))
        for tile, targets in (wide_row_tiles(GRADIENT_ROWS) if raw == "fp64" else row_tiles(GRADIENT_ROWS))
    ),
)
