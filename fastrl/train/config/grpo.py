"""GRPO and its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.on_policy import OnPolicyConfig


@dataclass(frozen=True, kw_only=True)
class SamplerCorrectionBlock:
    """Correction for a sampler whose log-probabilities differ from the trainer's (objectives.md, "Surrogates").

    Attributes:
        mode: "none"; "truncate" (TIS: min(ratio, high)); "mask" (icepop: 0 outside [low, high]);
            "sequence_mask" (0 for the whole sequence when its ratio exceeds high). None is the preset's own, and
            where that has none, "truncate" with rollout.max_staleness above 0 and "none" without.
        low: smallest ratio kept by "mask".
        high: cap or largest ratio kept.
    """

    mode: Literal["none", "truncate", "mask", "sequence_mask"] | None = None
    low: float = 0.5
    high: float = 3.0


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingBlock:
    """DAPO's dynamic sampling: replace groups without signal (all rewards equal).

    Attributes:
        max_rounds: extra rounds of sampling a step may take; 0 turns it off.
    """

    max_rounds: int = 0


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnPolicyConfig):
    """Group-relative policy optimisation and its family; the preset fills every field left at None.

    Attributes:
        algorithm: preset (docs/algorithms.md prints each as a record).
        parity: take another system's exact constants instead of the preset's.
        steps_per_generation: optimizer steps a generated batch is cut into.
        num_iterations: passes over each generated batch (mu).
        beta: KL coefficient; 0 needs no reference model.
        kl_estimator: which estimator of the KL to the reference.
        kl_placement: whether the KL enters the loss or the reward.
        epsilon: the ratio is clipped at 1 - epsilon, and at 1 + epsilon when epsilon_high is not set.
        epsilon_high: the ratio is clipped at 1 + epsilon_high; cispo caps the ratio itself at it.
        delta: cap of the ratio before the minimum, for negative advantages.
        loss_type: how tokens are averaged: "grpo" per sequence, "dapo" over all tokens, "dr_grpo" by a constant,
            "bnpo" is another word TRL uses for "dapo" on one device.
        scale_rewards: divide centred rewards by the group's or the batch's standard deviation, or not.
        multi_objective_aggregation: the advantage is that of the rewards' weighted sum, or (GDPO) each reward is
            normalised inside the group on its own, then weighed, summed and normalised over the batch.
        importance_sampling_level: ratio per token, or per sequence (GSPO).
        entropy_coef: weight of the entropy bonus.
        top_entropy_quantile: share of trained tokens, those of highest entropy, that keep a policy gradient.
        mask_truncated_completions: truncated completions leave the loss (DAPO's overlong filtering).
        keep_masked_denominator: completions so masked still count in the denominator of the average (TRL), instead
            of leaving it (verl).
        target_kl: stop the remaining updates of a batch when the mean KL to the sampling policy exceeds it.
        adaptive_kl_target: steer beta towards this KL to the reference; None keeps beta fixed.
        sampler_correction: correction for a sampler that differs from the trainer.
        dynamic_sampling: replacing groups without signal.
    """

    algorithm: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "sapo"] = "grpo"
    parity: Literal["trl", "verl", "openrlhf", "open_instruct"] | None = None
    learning_rate: float = 1e-6
    steps_per_generation: int = 1
    num_iterations: int = 1
    beta: float | None = None
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    kl_placement: Literal["loss", "reward"] | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo"] | None = None
    scale_rewards: Literal["group", "batch", "none"] | None = None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    importance_sampling_level: Literal["token", "sequence"] | None = None
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    mask_truncated_completions: bool = False
    keep_masked_denominator: bool = False
    target_kl: float | None = None
    adaptive_kl_target: float | None = None
    sampler_correction: SamplerCorrectionBlock = SamplerCorrectionBlock()
    dynamic_sampling: DynamicSamplingBlock = DynamicSamplingBlock()
