"""Frozen records that combine losses; a named algorithm is a preset of a few lines."""

from __future__ import annotations

from fastrl.algorithms import parity, presets
from fastrl.algorithms.control import AdaptiveKL, adapted, exceeds_target_kl
from fastrl.algorithms.describe import describe
from fastrl.algorithms.dynamic_sampling import Rounds, after_round, groups_with_signal, missing, waste
from fastrl.algorithms.policy_gradient import (
    PolicyGradient,
    has_signal,
    is_sequence_coupled,
    policy_loss,
    policy_loss_from_logprob,
    token_advantage,
)

__all__ = [
    "AdaptiveKL",
    "PolicyGradient",
    "Rounds",
    "adapted",
    "after_round",
    "describe",
    "exceeds_target_kl",
    "groups_with_signal",
    "has_signal",
    "is_sequence_coupled",
    "missing",
    "parity",
    "policy_loss",
    "policy_loss_from_logprob",
    "presets",
    "token_advantage",
    "waste",
]
