"""Inputs of the distillation ops, and the float64 truth by NumPy, in probabilities and by their definitions."""

from __future__ import annotations

import numpy as np
import torch

from fastrl.ops.linear_topk_divergence import TopTokens

BETAS = [0.0, 0.3, 0.5, 1.0]


def heads(n=37, d=16, v=509, e=24, dtype=torch.float32, *, peak=0.0):
    """hidden [N, D], weight [V, D], teacher_hidden [N, E], teacher_weight [V, E], target [N]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, teacher_hidden, teacher_weight = normal(n, d), normal(v, d) / 4, normal(n, e), normal(v, e) / 5
    target = torch.randint(v, (n,), generator=generator)
    if peak:
        hidden = hidden + peak * weight[target] / weight[target].square().sum(-1, keepdim=True)
        row = teacher_weight[target]
        teacher_hidden = teacher_hidden + peak * row / row.square().sum(-1, keepdim=True)
    return *(x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)), target


def probabilities(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(one, other):
    """[N] by the definition; 0 log 0 is 0."""
    terms = np.zeros_like(one)
    np.log(np.divide(one, other, out=np.ones_like(one), where=one > 0), out=terms, where=one > 0)
    return (one * terms).sum(-1)


def numpy_divergence(student, teacher, beta):
    """Probabilities [N, V] -> divergence [N]."""
    if beta in (0.0, 1.0):
        return kl(teacher, student) if beta == 0 else kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def top_tokens(teacher_hidden, teacher_weight, k):
    """From N x V logits in float64; the tail by subtraction."""
    logp = (teacher_hidden.double() @ teacher_weight.double().t()).log_softmax(-1)
    logprob, ids = logp.topk(k)
    return TopTokens(ids, logprob, (1 - logprob.exp().sum(-1)).clamp(min=0).log())
