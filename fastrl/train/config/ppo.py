"""Proximal policy optimisation with a critic, as in RLHF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.on_policy import OnPolicyConfig


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnPolicyConfig):
    """PPO with a reward model, a critic and a KL to the start; PPO-ptx with pretraining text mixed in.

    Attributes:
        reward_model_path: directory of a model with a scalar head, whose score of prompt and completion is a reward.
        reward_model_weight: its weight in the sum with reward_funcs.
        value_model_path: model with a scalar head that the critic starts from; None takes the reward model, or the
            policy's weights with a fresh head where there is none.
        sft_model_path: the frozen reference; None takes the policy's start.
        share_backbone: the critic is one more head on the policy's backbone, trained by the same optimizer.
        value_learning_rate: the critic's, at the end of warm-up; None takes learning_rate.
        num_mini_batches: optimizer steps that one pass over a round takes; a round has as many times
            per_device_train_batch_size x gradient_accumulation_steps completions.
        num_ppo_epochs: passes over each round.
        kl_coef: reward taken away per nat of KL to the reference; 0 needs no reference.
        kl_estimator: which estimator of the KL.
        adaptive_kl_target: steer kl_coef towards this KL to the reference, nats per token; None keeps it fixed.
        adaptive_kl_horizon: completions over which a constant error of 20 % changes kl_coef by about 20 %.
        target_kl: stop the remaining updates of a round when the mean KL to the sampling policy exceeds it.
        cliprange: the policy's ratio is clipped at 1 - cliprange and 1 + cliprange.
        cliprange_value: a value may move this far from the one at sampling time; None does not clip.
        vf_coef: weight of the critic's loss.
        gamma: discount per token.
        lam: lambda of generalised advantage estimation.
        whiten_rewards: rewards per token are scaled to unit variance over the round, their mean kept.
        normalize_rewards: scores are standardised by the mean and deviation of all scores of the run so far.
        reward_clip: scores are held in plus and minus this, after normalize_rewards; None does not.
        missing_eos_penalty: taken from the score of a truncated completion, after the clip; None takes nothing.
        pretrain_dataset: file of text, messages or prompt-completion rows whose likelihood is kept up (PPO-ptx).
        ptx_coef: weight of their mean negative log-likelihood per token in every policy update.
        pretrain_batch_size: rows of an update; None takes per_device_train_batch_size x gradient_accumulation_steps.
        pretrain_max_length: longer rows are cut to this many tokens.
    """

    learning_rate: float = 3e-6
    num_generations: int = 1
    reward_model_path: str | None = None
    reward_model_weight: float = 1.0
    value_model_path: str | None = None
    sft_model_path: str | None = None
    share_backbone: bool = False
    value_learning_rate: float | None = None
    num_mini_batches: int = 1
    num_ppo_epochs: int = 4
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    adaptive_kl_target: float | None = None
    adaptive_kl_horizon: int = 10_000
    target_kl: float | None = None
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    normalize_rewards: bool = False
    reward_clip: float | None = None
    missing_eos_penalty: float | None = None
    pretrain_dataset: str | None = None
    ptx_coef: float = 0.0
    pretrain_batch_size: int | None = None
    pretrain_max_length: int = 1024
