"""How far a student's distribution is from a teacher's: the generalised Jensen-Shannon divergence, and its gradient.

With p the teacher's and q the student's probabilities of a row:

    beta = 0         KL(p || q), forward: the student covers what the teacher does
    beta = 1         KL(q || p), reverse: the student keeps to what the teacher does most
    0 < beta < 1     beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    d / d z = q - p                          beta = 0
            = c q (log q - log m - KL(q || m))     m = p and c = 1 for beta = 1, else c = 1 - beta

z are the student's logits. The last line's limits are 0 at both ends, where beta stands for the plain divergences
instead; divided by beta or 1 - beta it tends to them. An outcome that both forbid (-inf) counts nothing; one that only
the second of a KL forbids makes it infinite.

Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, sec. 2 and 3; the convention for beta = 0 and 1 is TRL's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl.ops.logit_map import LogitMap
from fastrl.ops.row_kernels import row_kernels


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The specification: log-probabilities [N, V] of both -> divergence [N], differentiable by plain autograd.

    Args:
        student: log q; differentiable.
        teacher: log p; a constant or differentiable.
        beta: see the module.
    """
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    # Below this exp is an exact 0 in float64 too, and two forbidden tokens have a mixture.
    lowest = -1000.0
    mixture = torch.logaddexp(teacher.clamp(min=lowest) + math.log(beta), student.clamp(min=lowest) + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """sum_v exp(one) (one - other) [N]; tokens of probability 0 are left out before they are multiplied."""
    is_possible = one.exp() > 0
    gap = torch.where(is_possible, one, 0) - torch.where(is_possible, other, 0)
    return (one.exp() * gap).sum(-1)


def divergence_rows(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Logits [C, V] of both after their maps -> divergence [C] and its gradient by the student's logits [C, V].

    Both are read only; five [C, V] temporaries at most.
    """
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    q, p = logq.exp(), logp.exp()
    if beta == 0:
        value = logp.sub_(logq).masked_fill_(p == 0, 0).mul_(p).sum(-1)
        return value, q.sub_(p)
    other, share = logp, 1.0
    value = torch.zeros_like(q[:, 0])
    if beta < 1:
        other, share = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta)), 1 - beta
        value = beta * logp.sub_(other).masked_fill_(p == 0, 0).mul_(p).sum(-1)
    gap = logq.sub_(other).masked_fill_(q == 0, 0)
    inner = torch.mul(gap, q, out=p).sum(-1)
    return value + share * inner, gap.sub_(inner[:, None]).mul_(q).mul_(share)


def torch_rows(
    student: Tensor, teacher: Tensor, student_map: LogitMap, teacher_map: LogitMap, beta: float
) -> tuple[Tensor, Tensor]:
    """raw logits [C, V] of both -> divergence [C] and its gradient by the student's raw logits, in fresh memory."""
    slope = student_map.slope(student)
    z, teacher_z = student_map.apply(student), teacher_map.apply(teacher).to(student.dtype)
    value, gradient = divergence_rows(z, teacher_z, beta)
    gradient.mul_(student_map.factor(value))
    return value, gradient if slope is None else gradient.mul_(slope)


def triton_rows(
    student: Tensor, teacher: Tensor, student_map: LogitMap, teacher_map: LogitMap, beta: float
) -> tuple[Tensor, Tensor]:
    """As `torch_rows` by the Triton kernel: three reads of each, and the gradient in the student's memory."""
    from fastrl.kernels import divergence
    from fastrl.kernels.logit_map import map_arguments

    nobody = torch.full((len(student),), -1, dtype=torch.int64, device=student.device)
    stats = row_kernels("triton").stats
    lse = [
        stats(raw, nobody, logit_map).lse.to(student.dtype).contiguous()
        for raw, logit_map in ((student, student_map), (teacher, teacher_map))
    ]
    arguments = [map_arguments(x.scale, x.softcap, x.temperature, student.dtype) for x in (student_map, teacher_map)]
    return divergence.rows_(student, teacher, (lse[0], lse[1]), arguments[0], arguments[1], beta), student
