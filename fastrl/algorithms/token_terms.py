"""The terms of a token's loss, and what is logged about them, from the columns of a packed batch.

Everything that couples tokens of a sequence is made first, as constants (`Shared`); what is left is separable, so any
subset of rows can be differentiated on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.algorithms.describe import unwrapped
from fastrl.losses import ratio as ratios
from fastrl.losses.kl import KL, k3, penalty
from fastrl.types import TokenBatch

if TYPE_CHECKING:
    from fastrl.algorithms.policy_gradient import PolicyGradient

TAIL = 0.6931471805599453  # log 2: a token whose probability halved or doubled since it was sampled


@dataclass(frozen=True, slots=True)
class Shared:
    """What a token takes from its sequence, as constants.

    Attributes:
        sequence: [T] the packed sequence of each token.
        trained: [T] bool.
        log_ratio: [T] the shared ratio's value; None where each token has its own.
        correction: [T] weight; None where there is none, or where each token makes its own.
    """

    sequence: Tensor
    trained: Tensor
    log_ratio: Tensor | None
    correction: Tensor | None


def shared_constants(algorithm: PolicyGradient, batch: TokenBatch, logprob: Tensor | None) -> Shared:
    """logprob: [T] constant; None when `is_sequence_coupled` says no."""
    trained = batch.weight != 0
    sequence = torch.repeat_interleave(batch.cu_seqlens.diff().long(), output_size=len(trained))
    old = logprob if batch.old_logprob is None else batch.old_logprob
    log_ratio = weight = None
    if unwrapped(algorithm.ratio) not in ratios.TOKENWISE:
        log_ratio = torch.zeros_like(batch.weight)
        if batch.old_logprob is not None:
            assert logprob is not None
            log_ratio = algorithm.ratio(logprob - batch.old_logprob, sequence, trained)
    if algorithm.correction is not None and old is not None:
        assert batch.sampler_logprob is not None
        weight = algorithm.correction(old - batch.sampler_logprob, sequence, trained)
    return Shared(sequence, trained, log_ratio, weight)


def log_ratio_of(
    algorithm: PolicyGradient, batch: TokenBatch, shared: Shared, logprob: Tensor, rows: Tensor | slice
) -> Tensor:
    """[C] what the surrogate sees: value and gradient."""
    stopped = logprob.detach()
    if shared.log_ratio is not None:
        return shared.log_ratio[rows] + (logprob - stopped)
    old = stopped if batch.old_logprob is None else batch.old_logprob[rows]
    return algorithm.ratio(logprob - old, shared.sequence[rows], shared.trained[rows])


def factors(
    algorithm: PolicyGradient, batch: TokenBatch, shared: Shared, stopped: Tensor, rows: Tensor | slice
) -> tuple[Tensor | None, Tensor | None]:
    """[C] the correction and the trust region's mask, constants; None where the algorithm has none."""
    weight = None if shared.correction is None else shared.correction[rows]
    if weight is None and algorithm.correction is not None:
        assert batch.sampler_logprob is not None
        log_weight = stopped - batch.sampler_logprob[rows]
        weight = algorithm.correction(log_weight, shared.sequence[rows], shared.trained[rows])
    inside = None
    if algorithm.trust_region is not None:
        assert batch.advantage is not None
        old = stopped if batch.old_logprob is None else batch.old_logprob[rows]
        inside = algorithm.trust_region(stopped, old, batch.advantage[rows])
    return weight, inside


def token_loss(
    algorithm: PolicyGradient, batch: TokenBatch, shared: Shared, logprob: Tensor, entropy: Tensor, rows: Tensor
) -> Tensor:
    """[C] unweighted loss of some rows; differentiable in logprob [C] and entropy [C]."""
    assert batch.advantage is not None
    log_ratio = log_ratio_of(algorithm, batch, shared, logprob, rows)
    loss = algorithm.surrogate(log_ratio, batch.advantage[rows])
    for factor in factors(algorithm, batch, shared, logprob.detach(), rows):
        loss = loss if factor is None else loss * factor
    kl = kl_in_loss(algorithm)
    if kl is not None:
        assert batch.ref_logprob is not None
        loss = loss + kl.coef * penalty(kl, logprob, batch.ref_logprob[rows])
    return loss - algorithm.entropy_coef * entropy if algorithm.entropy_coef != 0 else loss


def token_metrics(
    algorithm: PolicyGradient, batch: TokenBatch, shared: Shared, logprob: Tensor, entropy: Tensor
) -> dict[str, Tensor]:
    """[T] detached; 0 where not trained."""
    assert batch.advantage is not None
    everything = slice(None)
    log_ratio = log_ratio_of(algorithm, batch, shared, logprob, everything).detach()
    weight, inside = factors(algorithm, batch, shared, logprob, everything)
    blocked = _blocked(algorithm, log_ratio, batch.advantage)
    if inside is not None:
        blocked = blocked | ((inside == 0) & (batch.advantage != 0))
    old = logprob if batch.old_logprob is None else batch.old_logprob
    found = {
        "entropy": entropy,
        "ratio": log_ratio.exp(),
        "ratio_tail": log_ratio.abs() > TAIL,
        "approx_kl": k3(old, logprob),  # samples are the old policy's: KL(old || now)
        "clip_ratio/low_mean": blocked & (batch.advantage < 0) & (log_ratio < 0),
        "clip_ratio/high_mean": blocked & (batch.advantage > 0) & (log_ratio > 0),
        "clip_ratio/region_mean": blocked,
    }
    if weight is not None:
        found["sampling/importance_sampling_ratio/mean"] = weight
    if batch.sampler_logprob is not None:
        difference = (old - batch.sampler_logprob).abs()
        found["sampling/importance_ratio"] = (old - batch.sampler_logprob).exp()
        found["sampling/sampling_logp_difference/mean"] = difference
        found["sampling/probability_error"] = difference.exp()
    if batch.ref_logprob is not None:
        found["kl"] = (algorithm.kl.estimator if algorithm.kl else k3)(logprob, batch.ref_logprob)
    return {name: torch.where(shared.trained, x.to(logprob.dtype), 0.0) for name, x in found.items()}


def _blocked(algorithm: PolicyGradient, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """[T] bool: the surrogate, whichever it is, has no gradient although there is an advantage."""
    with torch.enable_grad():
        leaf = log_ratio.detach().requires_grad_()
        (slope,) = torch.autograd.grad(algorithm.surrogate(leaf, advantage).sum(), leaf)
    return (slope == 0) & (advantage != 0)


def kl_in_loss(algorithm: PolicyGradient) -> KL | None:
    kl = algorithm.kl
    return kl if kl is not None and kl.placement == "loss" and kl.coef != 0 else None
