"""Two chunks of logits to divergences and their gradient by the student's: two reads of each, one write.

With p and q the teacher's and the student's probabilities of a row and m = beta p + (1 - beta) q:

    beta = 0        D = sum p log (p / q)                                   d z = q - p
    beta = 1        D = sum q log (q / p)                                   d z = q (log (q / p) - D)
    0 < beta < 1    D = beta sum p log (p / m) + (1 - beta) K,  K = sum q log (q / m)
                                                                            d z = (1 - beta) q (log (q / m) - K)

Log-sum-exps come from `token_stats`. A token of probability 0 adds nothing where it is the first of a ratio.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.logit_map import MapArguments, squashed
from fastrl.kernels.tuning import GRADIENT_ROWS, RowTile, audited, row_tile, row_tiles, wide_row_tiles

LOG_ZERO = tl.constexpr(-1000.0)  # exp of this is 0 in f64 too; two of them have a mixture where two -inf have none

WIDE_BLOCK_V = 512


def rows_(
    student: Tensor,
    teacher: Tensor,
    lse: tuple[Tensor, Tensor],
    student_map: MapArguments,
    teacher_map: MapArguments,
    beta: float,
    *,
    tile: RowTile | None = None,
) -> Tensor:
    """student, teacher [C, V] raw logits, (lse of both) [C] -> divergence [C]; the gradient replaces student's logits.

    student and lse are f32, or all f64; teacher may be either. The maps have one temperature each.
    """
    assert student.shape == teacher.shape
    assert student.stride(1) == 1
    assert teacher.stride(1) == 1
    assert all(x.is_contiguous() and x.dtype == student.dtype for x in lse)
    assert student_map.temperature is None
    assert teacher_map.temperature is None
    divergence = torch.empty_like(lse[0])
    n, v = student.shape
    tile = tile or _fitting(row_tile(student, GRADIENT_ROWS), wide=student.dtype == torch.float64)
    if n:
        with torch.cuda.device_of(student):
            _divergence_rows[(n,)](
                student,
                teacher,
                *lse,
                divergence,
                student.stride(0),
                teacher.stride(0),
                v,
                INNER=student_map.inner,
                OUTER=student_map.outer,
                TEACHER_INNER=teacher_map.inner,
                TEACHER_OUTER=teacher_map.outer,
                **_mixture(beta),
                BLOCK_V=tile.block_v,
                num_warps=tile.num_warps,
            )
    return divergence


def _fitting(tile: RowTile, *, wide: bool) -> RowTile:
    """The tile, narrower where two rows of f64 numbers would not fit a thread's registers."""
    return tile._replace(block_v=min(tile.block_v, WIDE_BLOCK_V)) if wide else tile


def _mixture(beta: float) -> dict:
    """The constants of beta."""
    logs = (math.log(beta), math.log1p(-beta)) if 0 < beta < 1 else (0.0, 0.0)
    return {"BETA": float(beta), "LOG_BETA": logs[0], "LOG_REST": logs[1]}


@triton.jit
def _divergence_rows(
    student_ptr,
    teacher_ptr,
    lse_ptr,
    teacher_lse_ptr,
    divergence_ptr,
    student_stride,
    teacher_stride,
    V,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    TEACHER_INNER: tl.constexpr,
    TEACHER_OUTER: tl.constexpr,
    BETA: tl.constexpr,
    LOG_BETA: tl.constexpr,
    LOG_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row: the sums first, then the gradient in place."""
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    lse, teacher_lse = tl.load(lse_ptr + row), tl.load(teacher_lse_ptr + row)
    beta = tl.full((), BETA, dtype)
    lane = tl.arange(0, BLOCK_V)
    of_teacher = tl.zeros([BLOCK_V], dtype)
    of_student = tl.zeros([BLOCK_V], dtype)
    for first in range(0, V, BLOCK_V):
        column = first + lane
        t, logq = _logs(student_ptr, column, V, lse, INNER, OUTER, dtype)
        _, logp = _logs(teacher_ptr, column, V, teacher_lse, TEACHER_INNER, TEACHER_OUTER, dtype)
        if BETA == 0.0:
            of_teacher += _term(logp, logq)
        elif BETA == 1.0:
            of_student += _term(logq, logp)
        else:
            mixture = _mixed(logp, logq, LOG_BETA, LOG_REST, dtype)
            of_teacher += _term(logp, mixture)
            of_student += _term(logq, mixture)
    inner = tl.sum(of_student, 0)
    divergence = inner
    if BETA < 1.0:
        divergence = tl.sum(of_teacher, 0)
        if BETA > 0.0:
            divergence = beta * divergence + (1.0 - beta) * inner
    tl.store(divergence_ptr + row, divergence)
    for first in range(0, V, BLOCK_V):
        column = first + lane
        t, logq = _logs(student_ptr, column, V, lse, INNER, OUTER, dtype)
        _, logp = _logs(teacher_ptr, column, V, teacher_lse, TEACHER_INNER, TEACHER_OUTER, dtype)
        q = tl.exp(logq)
        if BETA == 0.0:
            gradient = q - tl.exp(logp)
        elif BETA == 1.0:
            gradient = q * (_gap(logq, logp) - inner)
        else:
            gradient = (1.0 - beta) * q * (_gap(logq, _mixed(logp, logq, LOG_BETA, LOG_REST, dtype)) - inner)
        slope = tl.full((), OUTER, dtype)
        if INNER != 0.0:
            slope = slope * tl.full((), INNER, dtype) * (1.0 - t * t)
        tl.store(student_ptr + column, gradient * slope, mask=column < V)


@triton.jit
def _logs(raw_ptr, column, V, lse, INNER: tl.constexpr, OUTER: tl.constexpr, dtype: tl.constexpr):
    """The map's inner value and the log-probability of some columns; -inf for columns that are not there."""
    raw = tl.load(raw_ptr + column, mask=column < V, other=0.0).to(dtype)
    t = squashed(raw, INNER)
    return t, tl.where(column < V, t * tl.full((), OUTER, dtype) - lse, float("-inf"))


@triton.jit
def _gap(one, other):
    """one - other where exp(one) is not 0, else 0: two of -inf have no difference."""
    is_possible = tl.exp(one) > 0
    return tl.where(is_possible, one, 0.0) - tl.where(is_possible, other, 0.0)


@triton.jit
def _term(one, other):
    """exp(one) (one - other), the summand of a KL."""
    return tl.exp(one) * _gap(one, other)


@triton.jit
def _mixed(logp, logq, LOG_BETA: tl.constexpr, LOG_REST: tl.constexpr, dtype: tl.constexpr):
    """log (beta p + (1 - beta) q); below LOG_ZERO a probability counts as that."""
    x = tl.where(logp < LOG_ZERO, LOG_ZERO, logp) + tl.full((), LOG_BETA, dtype)
    y = tl.where(logq < LOG_ZERO, LOG_ZERO, logq) + tl.full((), LOG_REST, dtype)
    return tl.where(x > y, x, y) + tl.log(1.0 + tl.exp(-tl.abs(x - y)))


def _audited_rows(tile: RowTile, targets: tuple[str, ...], number: str, beta: float, inner: float) -> dict:
    wide = number == "fp64"
    tile = _fitting(tile, wide=wide)
    constexprs = {"INNER": inner, "OUTER": 1.0, "TEACHER_INNER": inner, "TEACHER_OUTER": 1.0, "BLOCK_V": tile.block_v}
    types = {"student_ptr": f"*{number}", "teacher_ptr": f"*{number}"}
    types |= {"student_stride": "i32:16", "teacher_stride": "i32:16"}
    return audited(_divergence_rows, types, constexprs | _mixture(beta), tile.num_warps, 1, targets, wide=wide)


AUDIT = tuple(
    _audited_rows(tile, targets, number, beta, inner)
    for number in ("fp32", "fp64")
    for tile, targets in (wide_row_tiles(GRADIENT_ROWS) if number == "fp64" else row_tiles(GRADIENT_ROWS))
    for beta in (0.0, 0.5, 1.0)
    for inner in (0.0, 0.5)
)
