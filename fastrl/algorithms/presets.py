"""Named algorithms. Each is a record; print it to see every choice (docs/algorithms.md prints them all).

A KL coefficient (`beta`) of 0 needs no reference model.
"""

from __future__ import annotations

from functools import partial

from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.losses import surrogate
from fastrl.losses.advantage import (
    gpg as gpg_advantage,
)
from fastrl.losses.advantage import (
    group_centered,
    group_normalized,
    leave_one_out,
    raw,
)
from fastrl.losses.kl import KL, k1, k3
from fastrl.losses.ratio import sequence_product, sequence_ratio
from fastrl.losses.surrogate import clipped, reinforce
from fastrl.losses.trust_region import binary_tv
from fastrl.losses.weighting import fixed_length, sequence_mean, sequence_sum, token_mean


def grpo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.0, eps: float = 1e-4) -> PolicyGradient:
    """Shao 2024, arXiv:2402.03300, eq. 3 (there beta 0.04)."""
    return PolicyGradient(
        advantage=partial(group_normalized, eps=eps),
        surrogate=partial(clipped, low=low, high=high),
        weighting=sequence_mean,
        kl=_in_loss(beta),
    )


def dr_grpo(*, length: int, low: float = 0.2, high: float = 0.2, beta: float = 0.0) -> PolicyGradient:
    """Liu 2025, arXiv:2503.20783: no division by the deviation, none by the length; `length` is the constant."""
    return PolicyGradient(
        advantage=group_centered,
        surrogate=partial(clipped, low=low, high=high),
        weighting=partial(fixed_length, length=length),
        kl=_in_loss(beta),
    )


def dapo(*, low: float = 0.2, high: float = 0.28) -> PolicyGradient:
    """Yu 2025, arXiv:2503.14476, eq. 8: clip-higher, token mean, no KL.

    Its other parts are `dynamic_sampling`, `losses.overlong` and `losses.weighting.without`.
    """
    return PolicyGradient(
        advantage=group_normalized,
        surrogate=partial(clipped, low=low, high=high),
        weighting=token_mean,
    )


def rloo(*, beta: float = 0.0) -> PolicyGradient:
    """Ahmadian 2024, arXiv:2402.14740: REINFORCE on whole completions, leave-one-out baseline, KL in the reward."""
    return PolicyGradient(
        advantage=leave_one_out,
        surrogate=reinforce,
        weighting=sequence_sum,
        kl=_in_reward(beta),
    )


def reinforce_pp(*, low: float = 0.2, high: float = 0.2, beta: float = 0.01) -> PolicyGradient:
    """Hu 2025, arXiv:2501.03262: no groups; returns with the KL in the reward, whitened over the step's tokens."""
    return PolicyGradient(
        advantage=raw,
        surrogate=partial(clipped, low=low, high=high),
        weighting=token_mean,
        kl=_in_reward(beta),
        whiten=True,
    )


def gspo(*, low: float = 3e-4, high: float = 4e-4, beta: float = 0.0) -> PolicyGradient:
    """Zheng 2025, arXiv:2507.18071, eq. 5: one ratio per sequence; its clip range is a thousandth of GRPO's."""
    return PolicyGradient(
        advantage=group_normalized,
        surrogate=partial(clipped, low=low, high=high),
        weighting=sequence_mean,
        ratio=sequence_ratio,
        kl=_in_loss(beta),
    )


def cispo(*, high: float = 5.0) -> PolicyGradient:
    """MiniMax 2025, arXiv:2506.13585, sec. 3.1."""
    return PolicyGradient(
        advantage=group_normalized,
        surrogate=partial(surrogate.cispo, high=high),
        weighting=token_mean,
    )


def sapo(*, temperature_positive: float = 1.0, temperature_negative: float = 1.05) -> PolicyGradient:
    """Gao 2025, arXiv:2511.20347."""
    gate = partial(surrogate.sapo, temperature_positive=temperature_positive, temperature_negative=temperature_negative)
    return PolicyGradient(advantage=group_normalized, surrogate=gate, weighting=sequence_mean)


def ppo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.05) -> PolicyGradient:
    """Schulman 2017, arXiv:1707.06347, as in RLHF: whitened advantages of a critic (`ops.gae`), KL in the reward."""
    return PolicyGradient(
        advantage=raw,
        surrogate=partial(clipped, low=low, high=high),
        weighting=token_mean,
        kl=_in_reward(beta),
        whiten=True,
    )


def gpg() -> PolicyGradient:
    """Chu 2025, arXiv:2504.02546: the policy gradient itself, scaled up by the share of groups without signal."""
    return PolicyGradient(advantage=gpg_advantage, surrogate=reinforce, weighting=token_mean)


def luspo(*, low: float = 2e-3, high: float = 2.5e-3) -> PolicyGradient:
    """Liu 2026, arXiv:2602.05261: GSPO whose sequences count by their length (its sec. 5.1 gives the clip range)."""
    return PolicyGradient(
        advantage=group_normalized,
        surrogate=partial(clipped, low=low, high=high),
        weighting=sequence_sum,
        ratio=sequence_ratio,
    )


def vespo() -> PolicyGradient:
    """Shen 2026, arXiv:2602.10693. The paper's ratio is to the sampler: put its log-probabilities in `old_logprob`."""
    return PolicyGradient(
        advantage=group_normalized, surrogate=surrogate.vespo, weighting=token_mean, ratio=sequence_product
    )


def dppo(*, low: float = 0.2, high: float = 0.2, cap: float = 20.0) -> PolicyGradient:
    """Qi 2026, arXiv:2602.04879, Binary-TV. The paper's region is around the sampler: put it in `old_logprob`."""
    return PolicyGradient(
        advantage=group_centered,
        surrogate=partial(surrogate.cispo, high=cap),
        weighting=token_mean,
        trust_region=partial(binary_tv, low=low, high=high),
    )


def _in_loss(beta: float) -> KL | None:
    return None if beta == 0 else KL(k3, beta)


def _in_reward(beta: float) -> KL | None:
    return None if beta == 0 else KL(k1, beta, "reward")
