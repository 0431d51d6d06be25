"""One small optimizer step with everything that goes wrong in real ones, and how to pack any part of it.

Ragged groups, an unjudged rollout, a group without signal, prompts, tool output between trained tokens, a sequence
with nothing trained, numbers that must not be read on untrained tokens, and policies that have moved apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrl.algorithms import PolicyGradient, token_advantage
from fastrl.types import Head, TokenBatch
from tests import oracle

NAN = float("nan")
GROUP = [4, 4, 2, 4, 2, 8, 8, 9]
REWARD = [1.5, 0.0, 0.5, 2.0, 0.25, 0.3, 0.3, NAN]
LENGTH = [5, 3, 7, 4, 2, 6, 3, 4]
UNTRAINED = {0: (0,), 1: (0,), 2: (0, 3, 4), 3: (0, 1), 4: (), 5: (0, 2), 6: (0,), 7: (0, 1, 2, 3)}
D, V = 6, 13


@dataclass(frozen=True)
class Step:
    """Columns of each sequence, float64, in one list per column."""

    hidden: list[Tensor]  # [n, D]
    target: list[Tensor]
    old: list[Tensor]
    sampler: list[Tensor]
    ref: list[Tensor]
    trained: list[Tensor]


def make_step(head: Head, *, spread: float = 0.25) -> Step:
    """The old policy, the sampler and the reference lie `spread` nats around the present one."""
    generator = torch.Generator().manual_seed(11)

    def noise(n: int) -> Tensor:
        return spread * torch.randn(n, generator=generator, dtype=torch.float64)

    step = Step([], [], [], [], [], [])
    for s, n in enumerate(LENGTH):
        hidden = torch.randn(n, D, generator=generator, dtype=torch.float64)
        target = torch.randint(V, (n,), generator=generator)
        trained = torch.tensor([t not in UNTRAINED[s] for t in range(n)])
        logprob = distribution(hidden, head).gather(1, target[:, None])[:, 0].detach()
        columns = [(logprob + noise(n)).where(trained, NAN) for _ in range(3)]
        for where, column in zip(
            (step.hidden, step.target, step.old, step.sampler, step.ref, step.trained),
            (hidden, target, *columns, trained),
            strict=True,
        ):
            where.append(column)
    return step


def make_head(*, plain: bool = True) -> Head:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    if plain:
        return Head(weight)
    bias = torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_()
    return Head(weight, bias=bias, temperature=0.7, softcap=5.0, logit_scale=0.5)


def distribution(hidden: Tensor, head: Head) -> Tensor:
    """[n, V] log-probabilities, by definition."""
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / head.temperature, -1)


def columns(algorithm: PolicyGradient, step: Step) -> tuple[list[Tensor], Tensor]:
    """Per-token advantages of each sequence, and the weights [S] of the whole step."""
    reward, group = torch.tensor(REWARD, dtype=torch.float64), torch.tensor(GROUP)
    weight = algorithm.weighting(torch.stack([t.sum() for t in step.trained]), group)
    kl = None
    if algorithm.kl is not None:
        kl = torch.cat([algorithm.kl.estimator(a, b) for a, b in zip(step.old, step.ref, strict=True)])
    borders = torch.tensor([0, *LENGTH]).cumsum(0)
    flat = token_advantage(algorithm, algorithm.advantage(reward, group), borders, torch.cat(step.trained), kl=kl)
    return list(flat.split(LENGTH)), weight


def pack(
    algorithm: PolicyGradient,
    step: Step,
    order: list[int],
    *,
    has_old: bool = True,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, TokenBatch]:
    """Hidden states and batch of some sequences in some order; advantages and weights are the whole step's."""
    advantage, weight = columns(algorithm, step)
    borders = torch.tensor([0, *[LENGTH[s] for s in order]]).cumsum(0).int()

    def cat(column: list[Tensor]) -> Tensor:
        joined = torch.cat([column[s] for s in order])
        return joined.to(precision) if precision is not None and joined.is_floating_point() else joined

    batch = TokenBatch(
        input_ids=torch.zeros(int(borders[-1]), dtype=torch.int64),
        position_ids=torch.cat([torch.arange(LENGTH[s]) for s in order]),
        target=cat(step.target),
        weight=cat([weight[s] * step.trained[s] for s in range(len(LENGTH))]),
        cu_seqlens=borders,
        max_seqlen=max(LENGTH[s] for s in order),
        sequence=torch.tensor(order),
        advantage=cat(advantage),
        sampler_logprob=cat(step.sampler),
        old_logprob=cat(step.old) if has_old else None,
        ref_logprob=cat(step.ref),
    )
    return cat(step.hidden).requires_grad_(), batch


def oracle_step(step: Step, head: Head, *, has_old: bool = True) -> list[oracle.Sequence1]:
    """The same step for the oracle: every sequence's columns as arrays."""
    out = []
    for s in range(len(LENGTH)):
        logp = distribution(step.hidden[s], head).detach()
        logprob = logp.gather(1, step.target[s][:, None])[:, 0].numpy()
        out.append(
            oracle.Sequence1(
                logprob=logprob,
                old=step.old[s].numpy() if has_old else np.where(step.trained[s].numpy(), logprob, NAN),
                sampler=step.sampler[s].numpy(),
                ref=step.ref[s].numpy(),
                entropy=-(logp.exp() * logp).sum(-1).numpy(),
                trained=step.trained[s].numpy(),
            )
        )
    return out
