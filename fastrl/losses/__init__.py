"""Pure functions on [T], [S] or [P] tensors: what is minimised, and how it is averaged."""

from __future__ import annotations

from fastrl.losses.advantage import (
    batch_normalized,
    clamped,
    gpg,
    group_centered,
    group_normalized,
    leave_one_out,
    multi_objective,
    raw,
    return_to_go,
    token_reward,
    whiten,
)
from fastrl.losses.correction import mask, sequence_mask, truncate
from fastrl.losses.entropy import entropy_keep
from fastrl.losses.kl import KL, k1, k2, k2_straight_through, k3, penalty, straight_through
from fastrl.losses.overlong import soft_overlong
from fastrl.losses.ratio import sequence_product, sequence_ratio, token_ratio
from fastrl.losses.supervised import dft, label_smoothed, nll
from fastrl.losses.surrogate import cispo, clipped, reinforce, sapo, vespo
from fastrl.losses.trust_region import binary_kl, binary_tv
from fastrl.losses.value import value_clipped, value_is_clipped, value_squared
from fastrl.losses.weighting import fixed_length, prompt_mean, sequence_mean, sequence_sum, token_mean, without

__all__ = [
    "KL",
    "batch_normalized",
    "binary_kl",
    "binary_tv",
    "cispo",
    "clamped",
    "clipped",
    "dft",
    "entropy_keep",
    "fixed_length",
    "gpg",
    "group_centered",
    "group_normalized",
    "k1",
    "k2",
    "k2_straight_through",
    "k3",
    "label_smoothed",
    "leave_one_out",
    "mask",
    "multi_objective",
    "nll",
    "penalty",
    "prompt_mean",
    "raw",
    "reinforce",
    "return_to_go",
    "sapo",
    "sequence_mask",
    "sequence_mean",
    "sequence_product",
    "sequence_ratio",
    "sequence_sum",
    "soft_overlong",
    "straight_through",
    "token_mean",
    "token_ratio",
    "token_reward",
    "truncate",
    "value_clipped",
    "value_is_clipped",
    "value_squared",
    "vespo",
    "whiten",
    "without",
]
