"""Learning from completions that were preferred, judged or ranked before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.on_policy import OnPolicyConfig
from fastrl.train.config.training import TrainConfig

PairLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TrainConfig):
    """The fields of all recipes over judged completions.

    Attributes:
        max_length: sequences with more tokens are refused, or cut when truncate is set.
        truncate: cut over-long sequences on the right instead of refusing their rows; the count is logged.
    """

    learning_rate: float = 1e-6
    max_length: int | None = 1024
    truncate: bool = False


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(PreferenceConfig):
    """The fields of the recipes whose loss compares the policy with a reference model.

    Attributes:
        beta: how strongly the policy is held to the reference.
        ref_model_name_or_path: directory of the reference; None is the model the run starts from.
        precompute_ref_log_probs: score all rows with the reference once, before training, and forget it: one model in
            memory. Otherwise a second model stays there and scores each step's rows.
        sync_ref_model: let the reference follow the policy (TR-DPO); needs precompute_ref_log_probs false.
        ref_model_mixup_alpha: share of the policy in the reference after each such step.
        ref_model_sync_steps: optimizer steps between them.
    """

    beta: float = 0.1
    ref_model_name_or_path: str | None = None
    precompute_ref_log_probs: bool = True
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ReferenceConfig):
    """Direct preference optimisation and its relatives, on pairs.

    Attributes:
        loss_type: one or more losses, added up (docs/preference.md has their formulas).
        loss_weights: one per loss; None weighs all by 1.
        label_smoothing: of sigmoid and robust: how likely a label is flipped; of exo_pair: epsilon.
        length_averaged: ipo compares means per token, as TRL does; false compares sums, as OpenRLHF does.
        discopop_tau: width of discopop's change from the logistic to the exponential term.
        reference_free: compare log-probabilities themselves, as if the reference gave every sequence the same.
    """

    loss_type: tuple[PairLoss, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    length_averaged: bool = True
    discopop_tau: float = 0.05
    reference_free: bool = False


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation, on single completions that are desirable or not.

    Attributes:
        loss_type: "kto", or "apo_zero_unpaired" without the KL baseline.
        desirable_weight: multiplies the loss of desirable completions.
        undesirable_weight: multiplies the loss of the others.
    """

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CPOConfig(PreferenceConfig):
    """Pairs without a reference model: CPO and SimPO.

    Attributes:
        loss_type: of the margin between log-probabilities: sums per sequence for sigmoid and hinge, means per token
            for ipo and simpo.
        beta: scale of the log-probabilities.
        label_smoothing: of sigmoid and simpo: how likely a label is flipped.
        cpo_alpha: weight of the NLL of the chosen completions, a mean over the step's tokens.
        simpo_gamma: margin that simpo asks for.
    """

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(PreferenceConfig):
    """Odds-ratio preference optimisation: SFT on the chosen sequence and a penalty on the odds of the rejected one.

    Attributes:
        beta: weight of the odds-ratio term (the paper's lambda).
        nll_on_prompt: the NLL counts prompt tokens too, as TRL and the authors' code do; false counts the completion's.
    """

    beta: float = 0.1
    nll_on_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class RRHFConfig(PreferenceConfig):
    """Rank responses to align human feedback: any number of scored completions of a prompt.

    Attributes:
        nll_coef: weight of the NLL of each prompt's best completion.
    """

    nll_coef: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnPolicyConfig):
    """DPO on the policy's own completions: sample, judge, pair the best with the worst of each prompt, learn.

    per_device_train_batch_size x gradient_accumulation_steps counts completions, as in grpo.

    Attributes:
        beta: how strongly the policy is held to the reference.
        loss_type: sigmoid, or ipo of log-ratios summed over the completion, as TRL's online DPO compares them.
        ref_model_name_or_path: directory of the reference; None is the model the run starts from.
        reward_model_path: directory of a model with a scalar head, whose score of prompt and completion is a reward.
        reward_model_weight: its weight in the sum with reward_funcs.
        missing_eos_penalty: taken from the reward of a truncated completion; None takes nothing.
    """

    learning_rate: float = 5e-7
    num_generations: int = 2
    beta: float = 0.1
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    ref_model_name_or_path: str | None = None
    reward_model_path: str | None = None
    reward_model_weight: float = 1.0
    missing_eos_penalty: float | None = None
