"""Distillation over two linear heads in one pass: divergence of whole distributions, without N x V numbers.

    loss = sum_n row_weight[n] ((1 - alpha) D_beta(p_n, q_n) + alpha (-log q_n[target[n]] at temperature 1))

with p_n the teacher's and q_n the student's distribution at `temperature`, D_beta of `fastrl.ops.divergence`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    check_target,
)
from fastrl.ops.divergence import generalized_jsd, torch_rows, triton_rows
from fastrl.ops.divergence_pass import DivergenceLoss, DivergencePlan, RowRule, divergence_pass
from fastrl.ops.gemm import accumulation_dtype, operand
from fastrl.ops.head import HeadSetting, HeadTensors, default_chunk_rows, head_operands
from fastrl.ops.linear_logprob import reference_logits
from fastrl.ops.local_head import local_head, on_this_rank
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.row_kernels import row_kernels
from fastrl.ops.token_stats import TokenStats, reference_stats

_IMPLEMENTATIONS = Implementations("linear_divergence", triton="fastrl.kernels.divergence")


@_disable_dynamo  # torch.compiler.disable would import the compiler before anybody calls
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.0,
    target: Tensor | None = None,
    alpha: float = 0.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    row_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> DivergenceLoss:
    """Weighted sum of divergences from a teacher's head to a student's, differentiated inside the chunk loop.

    Args:
        hidden: [N, D] the student's last hidden states; differentiable.
        weight: [V, D] its head, in hidden's dtype; differentiable. The whole vocabulary.
        teacher_hidden: [N, E] the teacher's of the same tokens; a constant, in any float dtype.
        teacher_weight: [V, E] its head, in teacher_hidden's dtype; a constant. The heads may be padded to different
            lengths: set valid_vocab then.
        beta: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        target: [N] int64 labels; negative ones are ignored. None: no labels, and no statistics of them.
        alpha: share of the labels' negative log-likelihood in the loss.
        bias, teacher_bias: [V]; bias is differentiable. -inf forbids a token.
        temperature: divides both heads' capped logits. Gradients shrink with its square, and nothing undoes that.
        softcap, teacher_softcap: cap on the logits, before the temperature; None caps nothing.
        logit_scale, teacher_logit_scale: multiply the logits, before the cap.
        valid_vocab: rows of both heads from here on are padding and are no tokens.
        row_weight: [N] a constant; rows of weight 0 never reach a head. None weighs every row 1.
        chunk_rows: rows worked on at a time; None fits a memory budget. Changes rounding only.
        backend: "reference" (N x V numbers, plain autograd), "torch" or "triton" (chunks); None: the machine's best.

    Returns:
        DivergenceLoss. The loss is float32 (float64 for float64 hidden states).

    Gradient: made in forward, multiplied by grad_output out of place in backward, so a second backward
        (retain_graph), a GradScaler and accumulation see the same numbers. Differentiable once; the teacher gets none.
        `weight.main_grad` is served as in `fastrl.ops.main_grad`. In a compiled step the call breaks the graph once.

    Cost: 2 A V (3 D + E) operations for A rows with a weight; 2 A V (D + E) when no gradient is wanted. Memory: about
        eight chunks of float32 logits and a float32 [V, D].

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, or a teacher that wants a gradient.
        RuntimeError: the backend that was asked for cannot run here.

    Source: soft and hard targets, Hinton et al. 2015, arXiv:1503.02531, sec. 2; generalised Jensen-Shannon
        divergence, Agarwal et al. 2024, arXiv:2306.13649, eq. 1 and 2.
    """
    weight, bias, _, _ = on_this_rank(weight, bias, None, None)
    teacher_weight, teacher_bias, _, _ = on_this_rank(teacher_weight, teacher_bias, None, None)
    check_student(hidden, weight, bias, target, row_weight, beta=beta, alpha=alpha, valid_vocab=valid_vocab)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_bias, valid_vocab)
    check_one_temperature(temperature)
    check_map(temperature, softcap, logit_scale)
    check_map(temperature, teacher_softcap, teacher_logit_scale)
    check_chunk_rows(chunk_rows)
    chosen = choose(backend, hidden, _IMPLEMENTATIONS)
    if chosen == "reference":
        return reference(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            beta=beta,
            target=target,
            alpha=alpha,
            bias=bias,
            teacher_bias=teacher_bias,
            temperature=temperature,
            softcap=softcap,
            teacher_softcap=teacher_softcap,
            logit_scale=logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            valid_vocab=valid_vocab,
            row_weight=row_weight,
        )
    kernels = row_kernels(chosen)
    setting = HeadSetting(LogitMap(logit_scale, softcap, temperature), kernels, None)
    tensors, setting = local_head(weight, bias, None, setting, valid_vocab)
    teacher_bias = None if teacher_bias is None else teacher_bias[:valid_vocab].detach()
    teacher = HeadTensors(teacher_weight[:valid_vocab].detach(), teacher_bias, None, None)
    teacher_setting = HeadSetting(LogitMap(teacher_logit_scale, teacher_softcap, temperature), kernels, None)
    plan = DivergencePlan(
        rule=_between_heads(
            setting.logit_map,
            teacher_hidden.detach(),
            teacher,
            teacher_setting,
            partial(triton_rows if chosen == "triton" else torch_rows, beta=beta),
        ),
        target=target,
        alpha=alpha,
        row_weight=None if row_weight is None else row_weight.to(accumulation_dtype(hidden)),
        # Two chunks of logits are alive where other ops have one.
        chunk_rows=chunk_rows or default_chunk_rows(hidden.shape[0], 2 * tensors.weight.shape[0], hidden.device),
    )
    return divergence_pass(hidden, tensors, setting, plan)


def reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.0,
    target: Tensor | None = None,
    alpha: float = 0.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    row_weight: Tensor | None = None,
) -> DivergenceLoss:
    """What `linear_divergence` means: plain autograd through N x V logits, without checks."""
    trained = torch.ones_like(hidden[:, 0], dtype=torch.bool) if row_weight is None else row_weight != 0
    rows = trained.nonzero()[:, 0]
    bias = None if bias is None else bias[:valid_vocab]
    teacher_bias = None if teacher_bias is None else teacher_bias[:valid_vocab]
    raw = reference_logits(hidden[rows], weight[:valid_vocab], bias, LogitMap())
    with torch.no_grad():
        teacher_map = LogitMap(teacher_logit_scale, teacher_softcap, temperature)
        teacher = reference_logits(teacher_hidden[rows], teacher_weight[:valid_vocab], teacher_bias, teacher_map)
    student = LogitMap(logit_scale, softcap, temperature).apply(raw)
    divergence = generalized_jsd(student.log_softmax(-1), teacher.to(raw.dtype).log_softmax(-1), beta)
    return weighed(divergence, LogitMap(logit_scale, softcap).apply(raw), rows, hidden, target, alpha, row_weight)


def weighed(
    divergence: Tensor,
    z: Tensor,
    rows: Tensor,
    hidden: Tensor,
    target: Tensor | None,
    alpha: float,
    row_weight: Tensor | None,
) -> DivergenceLoss:
    """For a `reference`: the loss from divergence [A] and student logits z [A, V] of `rows`, and numbers of all N."""
    share = torch.ones_like(divergence) if row_weight is None else row_weight[rows].to(divergence.dtype)
    per_row, stats = (1 - alpha) * divergence, None
    if target is not None:
        of_rows = reference_stats(z, target[rows])
        per_row = per_row - alpha * of_rows.logprob
        stats = TokenStats(*(_spread(x, rows, hidden) for x in of_rows))
    return DivergenceLoss((share * per_row).sum(), _spread(divergence, rows, hidden), stats)


def _spread(values: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    return values.new_zeros(hidden.shape[0]).index_copy(0, rows, values.detach())


def _between_heads(
    logit_map: LogitMap,
    teacher_hidden: Tensor,
    teacher: HeadTensors,
    teacher_setting: HeadSetting,
    compare: Callable[..., tuple[Tensor, Tensor]],
) -> RowRule:
    """The rule that makes the teacher's logits of the same rows beside the student's."""
    head = head_operands(teacher, teacher_setting)

    def rule(raw: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        return compare(raw, head.raw(operand(teacher_hidden[rows])), logit_map, head.logit_map)

    return rule


def check_student(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    *,
    beta: float,
    alpha: float,
    valid_vocab: int | None,
) -> None:
    """Check the arguments that both ops of this kind have, one sentence for each mistake."""
    check_shapes(
        "hidden[N,D] weight[V,D] target[N] bias[V] row_weight[N]",
        {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "row_weight": row_weight},
    )
    check_head(hidden, weight, weight.shape[0], valid_vocab)
    check_constant("row_weight", row_weight)
    for name, value in (("beta", beta), ("alpha", alpha)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if target is not None:
        check_target(target, valid_vocab or weight.shape[0])
    elif alpha > 0:
        raise ValueError(f"alpha = {alpha} weighs the likelihood of labels: pass target, or alpha=0")


def _check_teacher(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    valid_vocab: int | None,
) -> None:
    check_shapes(
        "hidden[N,D] teacher_hidden[N,E] teacher_weight[W,E] teacher_bias[W]",
        {
            "hidden": hidden,
            "teacher_hidden": teacher_hidden,
            "teacher_weight": teacher_weight,
            "teacher_bias": teacher_bias,
        },
    )
    if teacher_hidden.dtype != teacher_weight.dtype or not teacher_hidden.is_floating_point():
        raise ValueError(
            "teacher_hidden and teacher_weight must have one floating-point dtype, got "
            f"{teacher_hidden.dtype} and {teacher_weight.dtype}: cast one with .to()"
        )
    v, w = weight.shape[0], teacher_weight.shape[0]
    if (v != w and valid_vocab is None) or (valid_vocab or 0) > w:
        raise ValueError(
            f"student and teacher must share one vocabulary, got heads of {v} and {w} tokens: where they differ in "
            f"padding alone, pass valid_vocab of at most {min(v, w)}"
        )
