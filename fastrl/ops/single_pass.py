"""A loss over the waist, differentiated while a chunk's logits are alive: 6 N D V operations and no second product.

Per chunk: logits -> row statistics -> the caller's loss on [C] leaves -> one coefficient per row and statistic
-> d logits in the logits' memory -> d hidden, d weight. What couples rows is in the row weights, known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fastrl.ops.gemm import accumulation_dtype, operand
from fastrl.ops.head import HeadGradient, HeadOperands, HeadSetting, HeadTensors, Needs, chunks, head_operands
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.token_stats import RowGrads, RowStats, TokenStats

# statistics of a chunk (leaves when a gradient is wanted), rows [C] int64 -> unweighted loss [C]
ChunkLoss = Callable[[RowStats, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pass computes, besides the tensors it reads.

    Attributes:
        chunk_loss: the loss per row.
        row_weight: [N] in the accumulation dtype, a constant; None weighs every row 1.
        skip_tolerance: share of the gradient's bound that may be left out; 0 leaves out exact zeros only.
        chunk_rows: rows per chunk.
        with_mean: compute the mean logit too.
    """

    chunk_loss: ChunkLoss
    row_weight: Tensor | None
    skip_tolerance: float
    chunk_rows: int
    with_mean: bool = False


class PassResult(NamedTuple):
    """A pass's loss [], statistics [N] (0 for rows of weight 0), bound [] and gradient (None: none was wanted)."""

    loss: Tensor
    stats: TokenStats
    skipped_bound: Tensor
    gradient: HeadGradient | None


def single_pass(
    hidden: Tensor, tensors: HeadTensors, setting: HeadSetting, target: Tensor, needs: Needs, plan: Plan
) -> PassResult:
    """Run every chunk of rows that have a weight.

    On a GPU, finding those rows costs one host sync, and leaving rows out of the gradient products one per chunk.
    """
    zeros = torch.zeros((5, hidden.shape[0]), dtype=accumulation_dtype(hidden), device=hidden.device)
    loss, skipped_bound, stats = zeros[0].sum(), zeros[1].sum(), zeros[2:]
    head = head_operands(tensors, setting)
    total = HeadGradient(hidden, tensors, setting, needs) if any(needs) else None
    for rows in trained_chunks(plan.row_weight, hidden.shape[0], plan.chunk_rows):
        of_rows, value, bound = _one_chunk(plan, head, operand(hidden[rows]), target[rows], rows, total)
        stats[:, rows] = torch.stack(of_rows[:3])
        loss = loss + value
        skipped_bound = skipped_bound + bound
    return PassResult(loss, TokenStats(*stats.unbind()), skipped_bound, total)


def _one_chunk(
    plan: Plan, head: HeadOperands, chunk: Tensor, target: Tensor, rows: slice | Tensor, total: HeadGradient | None
) -> tuple[RowStats, Tensor, Tensor | float]:
    """Statistics, weighted loss and skipped bound of a chunk; its logits do not outlive the call."""
    logit_map = head.logit_map.rows(rows)
    if total is None:
        stats = head.stats(chunk, target, logit_map, with_mean=plan.with_mean)
        return stats, _weighted_loss(plan, stats, rows, differentiate=False)[0], 0.0
    raw = head.raw(chunk)
    stats = head.kernels.stats(raw, target, logit_map, with_mean=plan.with_mean)
    value, grads = _weighted_loss(plan, stats, rows, differentiate=True)
    return stats, value, _add_gradient(total, head, raw, chunk, rows, target, stats, grads, plan.skip_tolerance)


def trained_chunks(row_weight: Tensor | None, n: int, chunk_rows: int) -> Iterator[slice | Tensor]:
    """Places of the rows with a weight, a chunk at a time: slices when all have one, [C] indices otherwise."""
    if row_weight is not None:
        trained = row_weight.nonzero()[:, 0]
        if len(trained) < n:
            yield from trained.split(chunk_rows) if len(trained) else ()
            return
    yield from chunks(n, chunk_rows)


def _weighted_loss(
    plan: Plan, stats: RowStats, rows: slice | Tensor, *, differentiate: bool
) -> tuple[Tensor, RowGrads]:
    """The chunk's weighted loss [] and, when asked, its derivative by each statistic."""
    index = rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop, device=stats.logprob.device)
    leaves = stats.leaves() if differentiate else stats
    with torch.set_grad_enabled(differentiate or torch.is_grad_enabled()):
        per_row = plan.chunk_loss(leaves, index)
        if not isinstance(per_row, Tensor) or per_row.shape != stats.logprob.shape:
            got = f"shape {tuple(per_row.shape)}" if isinstance(per_row, Tensor) else type(per_row).__name__
            raise ValueError(f"loss_fn must return one loss per row, shape {tuple(stats.logprob.shape)}, got {got}")
        _refuse_foreign_leaves(per_row, leaves)
        weighted = (per_row if plan.row_weight is None else per_row * plan.row_weight[rows]).sum()
    if not weighted.requires_grad:
        return weighted, RowGrads(None, None, None)
    given = [x for x in leaves if x is not None]
    return weighted.detach(), RowGrads(*torch.autograd.grad(weighted, given, allow_unused=True))


def _refuse_foreign_leaves(per_row: Tensor, leaves: RowStats) -> None:
    """Raise when the loss depends on a trainable tensor other than the statistics: it would get no gradient."""
    ours = {id(x) for x in leaves if x is not None}
    pending: list[Node] = [per_row.grad_fn] if per_row.grad_fn is not None else []
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in ours:  # type: ignore[attr-defined]
            raise ValueError(
                "loss_fn uses a tensor that requires grad besides logprob and entropy; it would get no gradient: "
                "detach() it, or differentiate linear_logprob instead"
            )
        pending.extend(parent for parent, _ in node.next_functions if parent is not None)


def _add_gradient(
    total: HeadGradient,
    head: HeadOperands,
    raw: Tensor,
    chunk: Tensor,
    rows: slice | Tensor,
    target: Tensor,
    stats: RowStats,
    grads: RowGrads,
    skip_tolerance: float,
) -> Tensor | float:
    """Add the chunk's rows that carry gradient to the head's; raw is overwritten. Returns the bound of the rest."""
    logit_map = head.logit_map.rows(rows)
    kept = grads.is_nonzero(target)
    if kept is None:
        return 0.0
    bound: Tensor | float = 0.0
    if skip_tolerance > 0:
        bounds = gradient_bound(target, stats, grads, logit_map)
        skipped = _smallest(bounds, skip_tolerance)
        bound = bounds.where(skipped, 0).sum()
        kept = kept & ~skipped
    index = kept.nonzero()[:, 0]
    if len(index) == 0:
        return bound
    compact = None
    if len(index) < len(kept):
        compact, chunk, target, stats, grads = index, chunk[index], target[index], stats.rows(index), grads.rows(index)
        logit_map = logit_map.rows(index)
        rows = rows[index] if isinstance(rows, Tensor) else index + rows.start
    gradient = head.kernels.gradient(raw, target, stats, grads, logit_map, dtype=total.dtype(chunk), index=compact)
    total.add(head, chunk, rows, gradient)
    return bound


def gradient_bound(target: Tensor, stats: RowStats, grads: RowGrads, logit_map: LogitMap) -> Tensor:
    """[C] upper bound of each row's sum_v |d loss / d raw_v|, from numbers known before that gradient.

    2 |a| (1 - p) + 2 |b| entropy + |l| + |s|, times |scale| / temperature. The cap's slope is at most 1, and
    sum_v p_v |log p_v + H| <= 2 H because every -log p_v and H are at least 0.
    """
    bound = torch.zeros_like(stats.lse)
    if grads.logprob is not None:
        bound += 2 * (grads.logprob * stats.logprob.expm1()).abs().masked_fill(target < 0, 0)
    if grads.entropy is not None:
        bound += 2 * (grads.entropy * stats.entropy).abs()
    for grad in (grads.lse, grads.mean_logit):
        if grad is not None:
            bound += grad.abs()
    factor = logit_map.factor(stats.lse)
    return bound * (factor.abs() if isinstance(factor, Tensor) else abs(factor))


def _smallest(bounds: Tensor, tolerance: float) -> Tensor:
    """[C] bool, as many of the smallest rows as together stay within tolerance x the sum; none when that is NaN."""
    ascending, order = bounds.sort()
    within = ascending.cumsum(0) <= tolerance * bounds.sum()
    return torch.zeros_like(within).index_copy_(0, order, within)
