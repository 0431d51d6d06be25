"""A policy-gradient algorithm as a record of choices, and its loss.

Per trained token, with A the advantage, w the token's weight in the optimizer step and l its log-probability:

    loss = sum w (correction region surrogate(ratio(l - l_old), A) + kl.coef kl(l, l_ref) - entropy_coef H)

`policy_loss_from_logprob` is the specification, for callers who have log-probabilities. `policy_loss` is the same
value and gradient from hidden states, in one pass over the head's logits, which never exist whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.algorithms.describe import describe, unwrapped
from fastrl.algorithms.token_terms import kl_in_loss, shared_constants, token_loss, token_metrics
from fastrl.losses import correction as corrections
from fastrl.losses import ratio as ratios
from fastrl.losses.advantage import Advantage, return_to_go, whiten
from fastrl.losses.kl import KL
from fastrl.losses.ratio import token_ratio
from fastrl.losses.weighting import Weighting
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.ops.linear_token_loss import linear_token_loss
from fastrl.types import Head, LossOutput, TokenBatch

Surrogate = Callable[[Tensor, Tensor], Tensor]
Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]
Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
TrustRegion = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, repr=False)
class PolicyGradient:
    """The choices that make an algorithm; `repr` prints all of them with all their numbers.

    Attributes:
        advantage: `(reward [S], group [S]) -> [S]`, see `losses.advantage`.
        surrogate: `(log_ratio [T], advantage [T]) -> [T]`, see `losses.surrogate`.
        weighting: `(length [S], group [S]) -> [S]`, see `losses.weighting`.
        ratio: `(log_ratio [T], sequence [T], trained [T]) -> [T]`, see `losses.ratio`.
        kl: penalty for leaving the reference; None needs no reference.
        correction: `(l_old - l_mu [T], sequence [T], trained [T]) -> [T]`, see `losses.correction`; None is none.
        trust_region: `(logprob [T], old_logprob [T], advantage [T]) -> [T]`, see `losses.trust_region`; None is none.
        entropy_coef: bonus per nat of entropy.
        entropy_quantile: share of the step's tokens, those of highest entropy, that keep their advantage. Applied by
            the recipe with `losses.entropy.entropy_keep`, because it needs the whole step.
        whiten: per-token advantages are whitened over the step (`token_advantage`).
        gamma: discount per trained token of a KL placed in the reward (`token_advantage`).
    """

    advantage: Advantage
    surrogate: Surrogate
    weighting: Weighting
    ratio: Ratio = token_ratio
    kl: KL | None = None
    correction: Correction | None = None
    trust_region: TrustRegion | None = None
    entropy_coef: float = 0.0
    entropy_quantile: float = 1.0
    whiten: bool = False
    gamma: float = 1.0

    def __repr__(self) -> str:
        return describe(self)


def has_signal(algorithm: PolicyGradient, advantage: Tensor) -> Tensor:
    """Which items would move the policy: bool, of advantage's shape ([S] or [T]).

    With neither a KL nor an entropy bonus, an advantage of exactly 0 has loss 0 and gradient 0, and a sequence without
    signal need not enter the backbone; weights made before it is dropped keep the normaliser. A KL in the reward and
    whitening turn a sequence's 0 into other numbers for its tokens, so with them everything counts as signal.
    """
    if (algorithm.kl is not None and algorithm.kl.coef != 0) or algorithm.entropy_coef != 0 or algorithm.whiten:
        return torch.ones_like(advantage, dtype=torch.bool)
    return advantage != 0


def is_sequence_coupled(algorithm: PolicyGradient, batch: TokenBatch) -> bool:
    """Whether the loss of a token needs log-probabilities of others that the batch does not hold: two passes.

    A shared ratio couples a sequence once there is an old policy; before that it is 1. A correction over a sequence
    couples it only while l_old is the current policy itself. Functions that the library does not know count as coupled.
    """
    if batch.old_logprob is not None:
        return unwrapped(algorithm.ratio) not in ratios.TOKENWISE
    return algorithm.correction is not None and unwrapped(algorithm.correction) not in corrections.TOKENWISE


def token_advantage(
    algorithm: PolicyGradient, advantage: Tensor, cu_seqlens: Tensor, trained: Tensor, *, kl: Tensor | None = None
) -> Tensor:
    """Spread the sequences' advantages over their tokens, with the KL of the reward and whitening where asked for.

    Args:
        algorithm: kl (placement "reward"), gamma and whiten are read.
        advantage: [S] of the packed sequences of the whole optimizer step; constant.
        cu_seqlens: [S + 1] their borders.
        trained: [T] bool.
        kl: [T] the algorithm's estimate under the policy that sampled; needed for a KL in the reward.

    Returns:
        [T]; 0 where not trained.
    """
    spread = torch.repeat_interleave(advantage, cu_seqlens.diff().long(), output_size=len(trained))
    spread = torch.where(trained, spread, 0.0)
    if algorithm.kl is not None and algorithm.kl.placement == "reward" and algorithm.kl.coef != 0:
        if kl is None:
            raise ValueError("a KL penalty in the reward needs kl [T] under the policy that sampled")
        coef, gamma = algorithm.kl.coef, algorithm.gamma
        spread = return_to_go(advantage, kl, cu_seqlens, trained, coef=coef, gamma=gamma)
    return whiten(spread, trained) if algorithm.whiten else spread


def policy_loss(
    algorithm: PolicyGradient,
    hidden: Tensor,
    head: Head,
    batch: TokenBatch,
    *,
    chunk_rows: int | None = None,
    skip_tolerance: float = 0.0,
    backend: str | None = None,
) -> LossOutput:
    """`policy_loss_from_logprob` of the head's log-probabilities, without materialising logits.

    Args:
        algorithm: the choices.
        hidden: [T, D] last hidden states of the packed batch; differentiable.
        head: the output head; its weight and bias are differentiable.
        batch: `advantage` is needed, `ref_logprob` for a KL in the loss, `sampler_logprob` for a correction.
            Without `old_logprob`, l_old = stop(l): one update per batch.
        chunk_rows, skip_tolerance, backend: see `fastrl.ops.linear_token_loss`.

    Returns:
        The loss, and [T] metrics under TRL's names where it has one; 0 where not trained. With a skip_tolerance,
        "skipped_bound" repeats the certified bound of this batch.

    Raises:
        ValueError: a column of the batch that the algorithm needs is missing.

    Cost: one pass, 6NDV over the trained tokens. A sequence-coupled algorithm first runs the log-probabilities
    without gradient, 2NDV more.
    """
    _check(algorithm, batch)
    first = None
    if is_sequence_coupled(algorithm, batch):
        rows = batch.weight.nonzero()[:, 0]
        with torch.no_grad():
            stats = linear_logprob(
                hidden[rows],
                head.weight,
                batch.target[rows],
                bias=head.bias,
                temperature=head.temperature,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                chunk_rows=chunk_rows,
                backend=backend,
            )
        first = stats.logprob.new_zeros(len(batch.weight)).index_copy(0, rows, stats.logprob)
    shared = shared_constants(algorithm, batch, first)
    result = linear_token_loss(
        hidden,
        head.weight,
        batch.target,
        lambda logprob, entropy, rows: token_loss(algorithm, batch, shared, logprob, entropy, rows),
        bias=head.bias,
        temperature=head.temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        row_weight=batch.weight,
        skip_tolerance=skip_tolerance,
        chunk_rows=chunk_rows,
        backend=backend,
    )
    metrics = token_metrics(algorithm, batch, shared, result.stats.logprob, result.stats.entropy)
    if skip_tolerance > 0:
        metrics["skipped_bound"] = result.skipped_bound.expand(batch.weight.shape)
    return LossOutput(result.loss, metrics)


def policy_loss_from_logprob(
    algorithm: PolicyGradient, logprob: Tensor, entropy: Tensor, batch: TokenBatch
) -> LossOutput:
    """The loss from log-probabilities that exist: the specification of `policy_loss`.

    Only rows with a weight and a signal (`has_signal`) enter the sum, in their order. Taking sequences without
    signal out of the batch beforehand therefore leaves the very same sum, bit for bit.

    Args:
        algorithm: the choices.
        logprob: [T] of `batch.target`, temperature applied, nats; differentiable. Read on trained tokens only.
        entropy: [T] nats; differentiable.
        batch: as in `policy_loss`.

    Returns:
        As `policy_loss`.
    """
    _check(algorithm, batch)
    shared = shared_constants(algorithm, batch, logprob.detach())
    assert batch.advantage is not None
    rows = ((batch.weight != 0) & has_signal(algorithm, batch.advantage)).nonzero()[:, 0]
    token = token_loss(algorithm, batch, shared, logprob[rows], entropy[rows], rows)
    metrics = token_metrics(algorithm, batch, shared, logprob.detach(), entropy.detach())
    return LossOutput((batch.weight[rows] * token).sum(), metrics)


def _check(algorithm: PolicyGradient, batch: TokenBatch) -> None:
    if batch.advantage is None:
        raise ValueError("policy_loss needs batch.advantage: pack the step's advantages")
    if kl_in_loss(algorithm) is not None and batch.ref_logprob is None:
        raise ValueError("a KL in the loss needs batch.ref_logprob: score the batch with the reference or set kl=None")
    if algorithm.correction is not None and batch.sampler_logprob is None:
        raise ValueError("a correction needs batch.sampler_logprob: pack the rollouts' logprob or set correction=None")
