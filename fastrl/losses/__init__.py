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
from fastrl.losses.preference import (
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    robust,
    sigmoid,
    sppo_hard,
)
from fastrl.losses.ranked import is_best, rrhf
from fastrl.losses.ratio import sequence_product, sequence_ratio, token_ratio
from fastrl.losses.reference_free import log_odds_ratio, orpo, simpo
from fastrl.losses.reward_model import (
    bradley_terry,
    brier,
    centering,
    expected_calibration_error,
    last,
    product,
    ranked_pairs,
    step_cross_entropy,
    weakest,
)
from fastrl.losses.supervised import dft, label_smoothed, nll
from fastrl.losses.surrogate import cispo, clipped, gamma_weight, reinforce, sapo, vespo
from fastrl.losses.trust_region import binary_kl, binary_tv
from fastrl.losses.unpaired import kl_baseline, kto
from fastrl.losses.value import value_clipped, value_is_clipped, value_squared
from fastrl.losses.weighting import fixed_length, prompt_mean, sequence_mean, sequence_sum, token_mean, without

__all__ = [
    "KL",
    "apo_down",
    "apo_zero",
    "batch_normalized",
    "bco_pair",
    "binary_kl",
    "binary_tv",
    "bradley_terry",
    "brier",
    "centering",
    "cispo",
    "clamped",
    "clipped",
    "dft",
    "discopop",
    "entropy_keep",
    "exo_pair",
    "expected_calibration_error",
    "fixed_length",
    "gamma_weight",
    "gpg",
    "group_centered",
    "group_normalized",
    "hinge",
    "ipo",
    "is_best",
    "k1",
    "k2",
    "k2_straight_through",
    "k3",
    "kl_baseline",
    "kto",
    "label_smoothed",
    "last",
    "leave_one_out",
    "log_odds_ratio",
    "mask",
    "multi_objective",
    "nca_pair",
    "nll",
    "orpo",
    "penalty",
    "product",
    "prompt_mean",
    "ranked_pairs",
    "raw",
    "reinforce",
    "return_to_go",
    "robust",
    "rrhf",
    "sapo",
    "sequence_mask",
    "sequence_mean",
    "sequence_product",
    "sequence_ratio",
    "sequence_sum",
    "sigmoid",
    "simpo",
    "soft_overlong",
    "sppo_hard",
    "step_cross_entropy",
    "straight_through",
    "token_mean",
    "token_ratio",
    "token_reward",
    "truncate",
    "value_clipped",
    "value_is_clipped",
    "value_squared",
    "vespo",
    "weakest",
    "whiten",
    "without",
]
