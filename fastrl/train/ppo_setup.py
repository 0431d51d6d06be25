"""What a PPO run computes with, from its configuration: data first, then models, so that bad rows cost no loading."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.algorithms.presets import ppo
from fastrl.rewards.protocol import Reward
from fastrl.rollout.builtin import context_length
from fastrl.train.algorithm import ESTIMATORS
from fastrl.train.collect import Sampler
from fastrl.train.config import DataBlock, PPOConfig, SFTConfig
from fastrl.train.device import check_backend, pick_device
from fastrl.train.engine import opened_engine
from fastrl.train.environments import rewards_of
from fastrl.train.model_reward import ModelReward
from fastrl.train.order import row_at
from fastrl.train.policy_setup import check_lengths, prompts_of, sampler_of
from fastrl.train.ppo_losses import joint_update_loss, policy_update_loss, value_update_loss
from fastrl.train.ppo_roles import Roles, roles_of
from fastrl.train.prompts import Prompt
from fastrl.train.running_moments import RunningMoments
from fastrl.train.sequences import supervised_sequence
from fastrl.train.shares import packed_for_ranks, step_size
from fastrl.train.snapshot import Stateful
from fastrl.train.supervised import Example, load_examples
from fastrl.train.update import BatchLoss
from fastrl.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWARD_MODEL = "reward_model"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run computes with; made once, before the first round.

    Attributes:
        prompts: the pool that rounds draw from.
        held_out: prompts for evaluation; may be empty.
        pretrain: rows whose likelihood is kept up; may be empty.
        algorithm: the record of choices.
        roles: policy, reference, reward model and critic.
        policy_loss: of one micro-batch of the policy's update; holds the critic's too on a shared backbone.
        value_loss: of one micro-batch of the critic's own update; None on a shared backbone.
        moments: of all scores so far.
        sampler: engine, rewards and sampling parameters.
        groups: prompts of one round.
        total_steps: optimizer steps of the whole run.
    """

    prompts: list[Prompt]
    held_out: list[Prompt]
    pretrain: list[Example]
    algorithm: PolicyGradient
    roles: Roles
    policy_loss: BatchLoss
    value_loss: BatchLoss | None
    moments: RunningMoments
    sampler: Sampler
    groups: int
    total_steps: int


def set_up(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, resources: ExitStack, *, output_dir: str | None
) -> Setup:
    """Check the data, then load the models.

    Args:
        resources: closes the engine when the run ends.
        output_dir: where refused rows are written; None writes nothing.

    Raises:
        ValueError: bad rows, sequences that will not fit, or models that do not fit together.
    """
    check_backend(config.kernels.backend, pick_device(config.device))
    rewards = rewards_of(config)
    load = partial(prompts_of, config, tokenizer, rewards, output_dir=output_dir)
    prompts = load(config.train_dataset)
    held_out = load(config.eval_dataset) if config.eval_dataset else []
    pretrain = pretraining_rows(config, tokenizer)
    roles = roles_of(config, tokenizer)
    check_lengths(config, prompts + held_out, context=context_length(roles.policy))
    engine = resources.enter_context(opened_engine(config, roles.policy, tokenizer))
    algorithm = algorithm_of(config)
    if roles.value_head is not None:
        policy_loss = joint_update_loss(config, roles.policy, algorithm, roles.value_head)
    else:
        policy_loss = policy_update_loss(config, roles.policy, algorithm)
    groups = step_size(config) * config.num_mini_batches // config.num_generations
    rounds = ceil(config.num_train_epochs * len(prompts) / groups)
    steps_of_rounds = rounds * config.num_mini_batches * config.num_ppo_epochs
    return Setup(
        prompts=prompts,
        held_out=held_out,
        pretrain=pretrain,
        algorithm=algorithm,
        roles=roles,
        policy_loss=policy_loss,
        value_loss=None if roles.value_head is not None else value_update_loss(config, roles.value),
        moments=RunningMoments(),
        sampler=sampler_of(config, engine, tokenizer, [*rewards, *model_rewards(config, roles, tokenizer)]),
        groups=groups,
        total_steps=config.max_steps if config.max_steps > 0 else steps_of_rounds,
    )


def states_of(setup: Setup) -> Mapping[str, Stateful]:
    """What a checkpoint holds; the KL coefficient is part of the progress."""
    states: dict[str, Stateful] = {"optimizer": setup.roles.optimizer, "reward_moments": setup.moments}
    if setup.roles.critic_optimizer is not None:
        states["critic"] = setup.roles.critic_optimizer
    return states


def algorithm_of(config: PPOConfig) -> PolicyGradient:
    """PPO's record. The KL is part of the rewards that GAE sees, so its coefficient may change between rounds."""
    algorithm = ppo(low=config.cliprange, high=config.cliprange, beta=config.kl_coef)
    if algorithm.kl is None:
        return algorithm
    return replace(algorithm, kl=replace(algorithm.kl, estimator=ESTIMATORS[config.kl_estimator]))


def model_rewards(config: PPOConfig, roles: Roles, tokenizer: PreTrainedTokenizerBase) -> list[Reward]:
    """The reward model as a reward function; none without one."""
    if roles.reward is None:
        return []
    judge = ModelReward(
        roles.reward,
        tokenizer,
        token_budget=config.packing.token_budget + 1,  # it is fed the last token too
        device=roles.policy.device,
    )
    return [Reward(judge, weight=config.reward_model_weight, name=REWARD_MODEL)]


def pretraining_rows(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Read `pretrain_dataset` as supervised rows, long ones cut; the `data` block is about the prompts, not these."""
    if config.pretrain_dataset is None:
        return []
    supervised = SFTConfig(
        model_name_or_path=config.model_name_or_path,
        output_dir=config.output_dir,
        train_dataset=config.pretrain_dataset,
        max_length=config.pretrain_max_length,
        truncate=True,
        packing=config.packing,
        data=DataBlock(),
    )
    return load_examples(config.pretrain_dataset, tokenizer, supervised, output_dir=None).rows


def pretrain_batches(config: PPOConfig, setup: Setup, *, step: int) -> list[TokenBatch]:
    """The pretraining text of one policy update: every trained token weighs ptx_coef / (trained tokens there).

    Args:
        step: optimizer steps taken before; with the seed it fixes which rows are next.

    Returns:
        Batches without advantages; [] without pretraining rows.
    """
    rows = setup.pretrain
    if not rows:
        return []
    count = config.pretrain_batch_size or step_size(config)
    chosen = [rows[row_at(i, n=len(rows), seed=config.seed)] for i in range(step * count, (step + 1) * count)]
    tokens = sum(sum(row.is_trained) for row in chosen)
    sequences = [supervised_sequence(row.ids, row.is_trained, weight=config.ptx_coef / tokens) for row in chosen]
    return packed_for_ranks(sequences, token_budget=config.packing.token_budget, device=setup.roles.policy.device)
