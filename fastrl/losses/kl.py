"""Estimators of KL(policy || reference) from one sampled token, and where the penalty goes.

With d = l - l_ref: k1 = d (unbiased, signed), k2 = d^2 / 2 (small variance, biased), k3 = exp(-d) - 1 + d
(unbiased on policy, never negative). As a *loss* only k2 has the reverse KL's gradient: k1's averages to 0 and k3's
is biased off policy.

Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]


def k1(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """[T] d = l - l_ref, in nats; gradient 1."""
    return logprob - ref_logprob


def k2(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """[T] d^2 / 2, in nats; gradient d."""
    return (logprob - ref_logprob).square() / 2


def k3(logprob: Tensor, ref_logprob: Tensor, *, limit: float | None = None) -> Tensor:
    """[T] exp(-d) - 1 + d, in nats; gradient 1 - exp(-d).

    Args:
        logprob: [T] l, nats; differentiable.
        ref_logprob: [T] l_ref, nats; a constant.
        limit: holds d in +-limit, with gradient 0 outside; None leaves it alone (open-instruct: 40, verl: 20).

    Source: Schulman 2020; Shao 2024 (GRPO), arXiv:2402.03300, eq. 4.
    """
    difference = ref_logprob - logprob
    if limit is not None:
        difference = difference.clamp(-limit, limit)
    return difference.expm1() - difference  # expm1: near d = 0 the estimate is d^2 / 2, which exp(d) - 1 loses


def straight_through(logprob: Tensor, ref_logprob: Tensor, *, value: Estimator, gradient: Estimator) -> Tensor:
    """[T] one estimator's value with another's gradient."""
    shown = value(logprob.detach(), ref_logprob)
    carrier = gradient(logprob, ref_logprob)
    return shown + (carrier - carrier.detach())


def k2_straight_through(logprob: Tensor, ref_logprob: Tensor, *, estimator: Estimator = k3) -> Tensor:
    """[T] the value of `estimator` with the gradient of k2, the reverse KL's own: verl's "k1+" and "k3+".

    Source: verl `core_algos.kl_penalty`.
    """
    return straight_through(logprob, ref_logprob, value=estimator, gradient=k2)


@dataclass(frozen=True, slots=True)
class KL:
    """A penalty for leaving the reference.

    Attributes:
        estimator: `(logprob [T], ref_logprob [T]) -> [T]`, whose value is shown and penalised.
        coef: beta, reward per nat.
        placement: "loss" adds coef * estimate to each token's loss; "reward" subtracts it from each token's reward,
            a constant under the policy that sampled (`advantage.token_reward`).
        gradient: estimator whose gradient replaces the first one's, in the loss; None keeps its own.
            `gradient=k2` is k2_straight_through.
    """

    estimator: Estimator
    coef: float
    placement: Literal["loss", "reward"] = "loss"
    gradient: Estimator | None = None

    def __post_init__(self) -> None:
        if self.placement not in ("loss", "reward"):
            raise ValueError(f'KL placement must be "loss" or "reward", got {self.placement!r}')
        if not self.coef >= 0:
            raise ValueError(f"KL coef must be at least 0, got {self.coef}")
        if self.placement == "reward" and self.gradient is not None:
            raise ValueError("a KL penalty in the reward is a constant: leave gradient at None")


def penalty(kl: KL, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """[T] the estimate, not yet times coef, with the gradient the record asks for."""
    if kl.gradient is None:
        return kl.estimator(logprob, ref_logprob)
    return straight_through(logprob, ref_logprob, value=kl.estimator, gradient=kl.gradient)
