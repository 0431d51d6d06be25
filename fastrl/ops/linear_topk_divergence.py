"""Distillation from a few stored log-probabilities per token: the k most likely tokens, and all others as one.

The outcomes of a row are its k tokens and the tail, "any other token". Student and teacher are compared as
distributions over these k + 1 outcomes, so nothing is renormalised: for both KLs that is a lower bound of the
divergence over the vocabulary, exact for k = V, and the student keeps its freedom within the tail. The student needs
k logits and the log-sum-exp of the others; its gradient is

    d / d z_v = d_v                                  v among the k tokens
              = d_tail exp(z_v - lse_tail)           v in the tail

with d the gradient of the divergence by the k + 1 outcomes' logits (z of the k tokens, lse_tail). The tail's sum is
made without the k logits, not as 1 - sum: a confident student's tail keeps its digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import (
    check_chunk_rows,
    check_constant,
    check_head,
    check_map,
    check_one_temperature,
    check_shapes,
)
from fastrl.ops.divergence import divergence_rows, generalized_jsd
from fastrl.ops.divergence_pass import DivergenceLoss, DivergencePlan, RowRule, divergence_pass
from fastrl.ops.gemm import accumulation_dtype, operand
from fastrl.ops.head import HeadSetting, chunks, default_chunk_rows, head_operands
from fastrl.ops.linear_divergence import check_student, weighed
from fastrl.ops.linear_logprob import reference_logits
from fastrl.ops.local_head import local_head, on_this_rank
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.row_kernels import RowKernels, row_kernels
from fastrl.ops.token_stats import RowGrads, RowStats

_IMPLEMENTATIONS = Implementations("linear_topk_divergence", triton="fastrl.kernels.token_stats")

# The logit of a token that is not there: finite, so that a tail of no tokens has statistics in every backend.
ABSENT = -1e30


class TopTokens(NamedTuple):
    """What is kept of a distribution per row; constants.

    Attributes:
        ids: [N, K] int64, different tokens in each row.
        logprob: [N, K] of these tokens, nats; -inf for a place that is not used.
        tail: [N] log-probability of all other tokens together; -inf for none, as after renormalising.
    """

    ids: Tensor
    logprob: Tensor
    tail: Tensor


@torch.no_grad()
def linear_top_tokens(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    chunk_rows: int | None = None,
) -> TopTokens:
    """The k most likely tokens of each row, most likely first, without N x V logits and without gradient.

    Args as `linear_divergence`'s of the same names; k at most the number of tokens. The tail is summed by itself.

    Returns:
        TopTokens; log-probabilities in float32 (float64 for float64 inputs).

    Cost: 2 N D V operations and one selection of k per row.
    """
    weight, bias, _, _ = on_this_rank(weight, bias, None, None)
    check_shapes("hidden[N,D] weight[V,D] bias[V]", {"hidden": hidden, "weight": weight, "bias": bias})
    check_head(hidden, weight, weight.shape[0], valid_vocab)
    check_one_temperature(temperature)
    check_map(temperature, softcap, logit_scale)
    check_chunk_rows(chunk_rows)
    size = valid_vocab or weight.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the vocabulary of {size}, got {k}")
    setting = HeadSetting(LogitMap(logit_scale, softcap, temperature), row_kernels("torch"), None)
    tensors, setting = local_head(weight, bias, None, setting, valid_vocab)
    head = head_operands(tensors, setting)
    n, dtype = hidden.shape[0], accumulation_dtype(hidden)
    ids = torch.zeros((n, k), dtype=torch.int64, device=hidden.device)
    logprob, tail = hidden.new_zeros((n, k), dtype=dtype), hidden.new_zeros(n, dtype=dtype)
    for rows in chunks(n, chunk_rows or default_chunk_rows(n, size, hidden.device)):
        z = head.logit_map.apply(head.raw(operand(hidden[rows])))
        lse = z.logsumexp(-1)
        top, ids[rows] = z.topk(k)
        logprob[rows] = top - lse[:, None]
        tail[rows] = z.scatter_(-1, ids[rows], -math.inf).logsumexp(-1) - lse
    return TopTokens(ids, logprob, tail)


@_disable_dynamo  # torch.compiler.disable would import the compiler before anybody calls
def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopTokens,
    *,
    beta: float = 0.0,
    target: Tensor | None = None,
    alpha: float = 0.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    row_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> DivergenceLoss:
    """`linear_divergence` from what `linear_top_tokens` kept of the teacher, over k + 1 outcomes per row.

    Args:
        hidden: [N, D] the student's last hidden states; differentiable.
        weight: [V, D] its head, in hidden's dtype; differentiable.
        teacher: at `temperature`; constants.
        beta, target, alpha, bias, temperature, softcap, logit_scale, valid_vocab, row_weight, chunk_rows: as there;
            temperature is the student's.
        backend: "reference" (N x V numbers, plain autograd), "torch" or "triton" (chunks); None: the machine's best.

    Returns:
        DivergenceLoss.

    Gradient: as `linear_divergence`'s.

    Cost: 6 A D V operations for A rows with a weight, 2 A D V when no gradient is wanted. Memory: three chunks of
        float32 logits and a float32 [V, D].

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit (the teacher's ids are range-checked on CPU only).
        RuntimeError: the backend that was asked for cannot run here.
    """
    weight, bias, _, _ = on_this_rank(weight, bias, None, None)
    check_student(hidden, weight, bias, target, row_weight, beta=beta, alpha=alpha, valid_vocab=valid_vocab)
    _check_teacher(hidden, teacher, valid_vocab or weight.shape[0])
    check_one_temperature(temperature)
    check_map(temperature, softcap, logit_scale)
    check_chunk_rows(chunk_rows)
    chosen = choose(backend, hidden, _IMPLEMENTATIONS)
    if chosen == "reference":
        return reference(
            hidden,
            weight,
            teacher,
            beta=beta,
            target=target,
            alpha=alpha,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            valid_vocab=valid_vocab,
            row_weight=row_weight,
        )
    setting = HeadSetting(LogitMap(logit_scale, softcap, temperature), row_kernels(chosen), None)
    tensors, setting = local_head(weight, bias, None, setting, valid_vocab)
    plan = DivergencePlan(
        rule=_from_top_tokens(setting.logit_map, setting.kernels, teacher, beta),
        target=target,
        alpha=alpha,
        row_weight=None if row_weight is None else row_weight.to(accumulation_dtype(hidden)),
        chunk_rows=chunk_rows or default_chunk_rows(hidden.shape[0], tensors.weight.shape[0], hidden.device),
    )
    return divergence_pass(hidden, tensors, setting, plan)


def reference(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopTokens,
    *,
    beta: float = 0.0,
    target: Tensor | None = None,
    alpha: float = 0.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    row_weight: Tensor | None = None,
) -> DivergenceLoss:
    """What `linear_topk_divergence` means: plain autograd through N x V logits, without checks."""
    trained = torch.ones_like(hidden[:, 0], dtype=torch.bool) if row_weight is None else row_weight != 0
    rows = trained.nonzero()[:, 0]
    bias = None if bias is None else bias[:valid_vocab]
    raw = reference_logits(hidden[rows], weight[:valid_vocab], bias, LogitMap())
    z = LogitMap(logit_scale, softcap, temperature).apply(raw)
    ids = teacher.ids[rows]
    rest = z.scatter(-1, ids, ABSENT).logsumexp(-1, keepdim=True)
    outcomes = torch.cat([z.gather(-1, ids), rest], -1).log_softmax(-1)
    divergence = generalized_jsd(outcomes, _outcomes(teacher, rows, z.dtype).log_softmax(-1), beta)
    return weighed(divergence, LogitMap(logit_scale, softcap).apply(raw), rows, hidden, target, alpha, row_weight)


def _outcomes(teacher: TopTokens, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """[C, K + 1] the teacher's log-probabilities of a row's outcomes, the tail last."""
    return torch.cat([teacher.logprob[rows], teacher.tail[rows][:, None]], -1).to(dtype)


def _from_top_tokens(logit_map: LogitMap, kernels: RowKernels, teacher: TopTokens, beta: float) -> RowRule:
    """The rule that compares k + 1 outcomes, and spreads the tail's gradient over its tokens."""

    def rule(raw: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        ids, identity = teacher.ids[rows], LogitMap()
        slope = logit_map.slope(raw)
        z = logit_map.apply(raw)
        top = z.gather(-1, ids)
        z.scatter_(-1, ids, ABSENT)
        nobody = torch.full_like(ids[:, 0], -1)
        tail = kernels.stats(z, nobody, identity).lse
        divergence, d_outcomes = divergence_rows(
            torch.cat([top, tail[:, None]], -1), _outcomes(teacher, rows, z.dtype), beta
        )
        zero = torch.zeros_like(tail)
        grads = RowGrads(None, None, d_outcomes[:, -1].contiguous())
        stats = RowStats(zero, zero, tail.masked_fill(tail < ABSENT / 2, 0))
        gradient = kernels.gradient(z, nobody, stats, grads, identity, dtype=z.dtype)
        gradient.scatter_(-1, ids, d_outcomes[:, :-1]).mul_(logit_map.factor(divergence))
        return divergence, gradient if slope is None else gradient.mul_(slope)

    return rule


def _check_teacher(hidden: Tensor, teacher: TopTokens, vocabulary: int) -> None:
    check_shapes(
        "hidden[N,D] teacher.ids[N,K] teacher.logprob[N,K] teacher.tail[N]",
        {
            "hidden": hidden,
            "teacher.ids": teacher.ids,
            "teacher.logprob": teacher.logprob,
            "teacher.tail": teacher.tail,
        },
    )
    for name, tensor in teacher._asdict().items():
        check_constant(f"teacher.{name}", tensor)
    if teacher.ids.dtype != torch.int64:
        raise ValueError(f"teacher.ids must be int64, got {teacher.ids.dtype}")
    if teacher.ids.device.type == "cpu" and teacher.ids.numel():
        low, high = int(teacher.ids.min()), int(teacher.ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"teacher.ids must be in [0, {vocabulary}), got {low if low < 0 else high}")
