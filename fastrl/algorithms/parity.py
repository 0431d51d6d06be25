"""Other systems' exact constants, as records: same batch, same loss and gradient.

They differ from the systems in two ways, on purpose. Groups of one, or of equal rewards, have advantage 0 (verl
passes a singleton's raw score on). Sums run over the whole optimizer step (TRL's "grpo" and "bnpo" average
micro-batches).
"""

from __future__ import annotations

from functools import partial

from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.losses.advantage import clamped, group_centered, group_normalized
from fastrl.losses.correction import sequence_mask, truncate
from fastrl.losses.kl import KL, k1, k3
from fastrl.losses.ratio import token_ratio
from fastrl.losses.surrogate import clipped
from fastrl.losses.weighting import token_mean


def trl() -> PolicyGradient:
    """TRL `GRPOConfig()`: loss_type "dapo", beta 0, vLLM correction "sequence_mask" at 3.0."""
    return PolicyGradient(
        advantage=partial(group_normalized, ddof=1, eps=1e-4),
        surrogate=partial(clipped, low=0.2, high=0.2),
        weighting=token_mean,
        correction=partial(sequence_mask, high=3.0),
    )


def verl() -> PolicyGradient:
    """verl `adv_estimator=grpo`, policy loss "vanilla": dual clip 3, log-ratio held in +-20, no KL."""
    return PolicyGradient(
        advantage=partial(group_normalized, ddof=1, eps=1e-6),
        surrogate=partial(clipped, low=0.2, high=0.2, dual_clip=3.0),
        weighting=token_mean,
        ratio=partial(token_ratio, limit=20.0),
    )


def openrlhf() -> PolicyGradient:
    """OpenRLHF `advantage.estimator=group_norm`: k1 in the reward, the shaped reward clipped, log-ratio in +-20."""
    normalized = partial(group_normalized, ddof=1, eps=1e-9)
    return PolicyGradient(
        advantage=partial(clamped, advantage=normalized, limit=10.0),
        surrogate=partial(clipped, low=0.2, high=0.2),
        weighting=token_mean,
        ratio=partial(token_ratio, limit=20.0),
        kl=KL(k1, 0.01, "reward"),
    )


def open_instruct() -> PolicyGradient:
    """open-instruct `grpo_fast`: centred rewards, clip-higher, k3 in the loss, truncated correction."""
    return PolicyGradient(
        advantage=group_centered,
        surrogate=partial(clipped, low=0.2, high=0.272),
        weighting=token_mean,
        kl=KL(partial(k3, limit=40.0), 0.05),
        correction=partial(truncate, high=2.0),
    )
