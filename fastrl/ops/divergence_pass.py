"""Divergence from a teacher and its gradients in one pass over the student's head: 6 N D V operations.

Per chunk: student logits -> a rule says how far each row is from its teacher, and d / d logits -> d hidden, d weight.
The rule fetches what it knows of the teacher: logits of a second head, or a few stored log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.ops.first_order import first_order
from fastrl.ops.gemm import accumulation_dtype, operand
from fastrl.ops.head import HeadGradient, HeadOperands, HeadSetting, HeadTensors, Needs, head_operands
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.single_pass import trained_chunks
from fastrl.ops.token_stats import RowGrads, TokenStats

# raw student logits [C, V], which may be overwritten, and their places in the N rows
# -> divergence [C], d divergence / d raw [C, V] in fresh memory or raw's
RowRule = Callable[[Tensor, slice | Tensor], tuple[Tensor, Tensor]]


class DivergenceLoss(NamedTuple):
    """A weighted sum of divergences, and what it was made of.

    Attributes:
        loss: [] differentiable.
        divergence: [N] nats, detached; 0 in rows whose weight is 0, which never reach a head.
        stats: of the student's distribution at temperature 1 and the target, [N] each, detached, 0 in those rows;
            None without a target.
    """

    loss: Tensor
    divergence: Tensor
    stats: TokenStats | None


@dataclass(frozen=True, slots=True)
class DivergencePlan:
    """What a pass computes, besides the tensors it reads.

    Attributes:
        rule: the divergence of a chunk's rows.
        target: [N] int64 hard labels, or None.
        alpha: share of the labels' negative log-likelihood, at temperature 1, in the loss.
        row_weight: [N] in the accumulation dtype, a constant; None weighs every row 1.
        chunk_rows: rows per chunk.
    """

    rule: RowRule
    target: Tensor | None
    alpha: float
    row_weight: Tensor | None
    chunk_rows: int


def divergence_pass(hidden: Tensor, tensors: HeadTensors, setting: HeadSetting, plan: DivergencePlan) -> DivergenceLoss:
    """Run every chunk of rows that have a weight; differentiable when something wants a gradient."""
    wanted = Needs(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, *tensors)))
    with torch.autocast(hidden.device.type, enabled=False):
        if any(wanted):
            loss, numbers = _DivergencePass.apply(hidden, *tensors, setting, plan, wanted)
        else:
            loss, numbers, _ = _run(hidden, tensors, setting, plan, wanted)
    divergence, *stats = numbers.unbind()
    return DivergenceLoss(loss, divergence, TokenStats(*stats) if plan.target is not None else None)


def _run(
    hidden: Tensor, tensors: HeadTensors, setting: HeadSetting, plan: DivergencePlan, needs: Needs
) -> tuple[Tensor, Tensor, HeadGradient | None]:
    """Loss [], numbers [1 or 4, N] (divergence, and logprob, entropy, lse where there is a target), gradient."""
    kinds = 1 if plan.target is None else 4
    numbers = torch.zeros((kinds, hidden.shape[0]), dtype=accumulation_dtype(hidden), device=hidden.device)
    loss = numbers.sum()
    head = head_operands(tensors, setting)
    total = HeadGradient(hidden, tensors, setting, needs) if any(needs) else None
    for rows in trained_chunks(plan.row_weight, hidden.shape[0], plan.chunk_rows):
        loss = loss + _one_chunk(plan, head, operand(hidden[rows]), rows, numbers, total)
    return loss, numbers, total


def _one_chunk(
    plan: DivergencePlan,
    head: HeadOperands,
    chunk: Tensor,
    rows: slice | Tensor,
    numbers: Tensor,
    total: HeadGradient | None,
) -> Tensor:
    """The chunk's share of the loss []; writes its columns of `numbers` and adds its gradient."""
    raw = head.raw(chunk)
    weight = raw.new_ones(len(raw)) if plan.row_weight is None else plan.row_weight[rows]
    at_labels: Tensor | None = None
    if plan.target is not None:
        target, plain = plan.target[rows], LogitMap(head.logit_map.scale, head.logit_map.softcap)
        stats = head.kernels.stats(raw, target, plain)
        numbers[1:, rows] = torch.stack(stats[:3])
        if total is not None and plan.alpha > 0:
            grads = RowGrads(-plan.alpha * weight, None, None)
            out = torch.empty_like(raw)
            at_labels = head.kernels.gradient(raw, target, stats, grads, plain, dtype=raw.dtype, out=out)
    divergence, gradient = plan.rule(raw, rows)
    numbers[0, rows] = divergence
    soft_weight = (1 - plan.alpha) * weight
    if total is not None:
        gradient = gradient.mul_(soft_weight[:, None])
        total.add(head, chunk, rows, gradient if at_labels is None else gradient.add_(at_labels))
    if plan.target is None:
        return (soft_weight * divergence).sum()
    return (soft_weight * divergence - plan.alpha * weight * stats.logprob).sum()


class _DivergencePass(torch.autograd.Function):
    """Keeps the gradients that the pass made and scales them when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        setting: HeadSetting,
        plan: DivergencePlan,
        needs: Needs,
    ) -> tuple[Tensor, Tensor]:
        tensors = HeadTensors(weight, bias, lora_a, lora_b)
        loss, numbers, total = _run(hidden, tensors, setting, plan, needs)
        assert total is not None
        ctx.save_for_backward(*total.settled(hidden, tensors))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, *tensors)]
        ctx.main_grad = setting.main_grad if needs.weight else None
        ctx.mark_non_differentiable(numbers)
        ctx.set_materialize_grads(False)
        return loss, numbers

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 8
        kept = list(ctx.saved_tensors)
        for_autograd = None
        if ctx.main_grad is not None:
            for_autograd, kept[1] = ctx.main_grad.taken(kept[1], grad_loss), None
        d_hidden, d_weight, *others = (
            None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in zip(kept, ctx.dtypes, strict=True)
        )
        return d_hidden, for_autograd if d_weight is None else d_weight, *others, None, None, None
