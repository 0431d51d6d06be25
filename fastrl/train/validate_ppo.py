"""Rules about PPO: what is set has an effect, a round fits its groups, and somebody judges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastrl.train.config import PPOConfig
from fastrl.train.config.pipeline import is_made_later
from fastrl.train.tiny_files import MODELS, is_tiny, tiny_problem
from fastrl.train.validate_files import dataset_problem
from fastrl.train.validate_ranks import launched_step_size, times_ranks
from fastrl.train.validate_rewards import reward_problem

Problems = Iterator[str]


def ppo_problems(config: PPOConfig) -> Problems:
    """What PPO adds to the rules of every recipe with an optimizer."""
    yield from _judges(config)
    yield from _models(config)
    yield from _round(config)
    yield from _sampling(config)
    yield from _kl(config)
    yield from _pretraining(config)


def _judges(config: PPOConfig) -> Problems:
    if not config.reward_funcs and config.reward_model_path is None and config.environment.factory is None:
        yield "reward_model_path: nothing judges the completions; set it, or reward_funcs, or both"
    for spec in config.reward_funcs:
        yield from reward_problem(spec)
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        yield (
            f"reward_weights: needs one number for each of the {len(config.reward_funcs)} reward_funcs, "
            f"got {len(config.reward_weights)}"
        )
    if config.reward_model_path is None and config.reward_model_weight != 1:
        yield "reward_model_weight: has no effect without reward_model_path; set that too"


def _models(config: PPOConfig) -> Problems:
    for key, path in (
        ("sft_model_path", config.sft_model_path),
        ("reward_model_path", config.reward_model_path),
        ("value_model_path", config.value_model_path),
    ):
        if path is None or is_made_later(path):
            continue
        if is_tiny(path):
            yield from tiny_problem(key, path, MODELS)
        elif not any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")):
            yield f"{key}: {path} is no model directory (config.json) and no adapter (adapter_config.json)"
    if config.kl_coef == 0 and config.sft_model_path is not None:
        yield "sft_model_path: the reference is not needed while kl_coef is 0; set kl_coef, or remove it"
    if config.use_peft and config.sft_model_path is not None:
        yield "sft_model_path: with use_peft the reference is the policy with its adapter off; remove one of them"
    yield from _adapters(config)
    if config.share_backbone and config.value_model_path is not None:
        yield "value_model_path: with share_backbone the critic is a head on the policy; remove one of them"
    if config.share_backbone and config.value_learning_rate is not None:
        yield "value_learning_rate: with share_backbone one optimizer trains both; weigh the critic with vf_coef"


def _adapters(config: PPOConfig) -> Problems:
    """Adapters sit on the policy's frozen base, and only there."""
    for key, path in (
        ("reward_model_path", config.reward_model_path),
        ("value_model_path", config.value_model_path),
    ):
        is_adapter = path is not None and (Path(path) / "adapter_config.json").is_file()
        if is_adapter and not config.use_peft:
            yield f"{key}: {path} is an adapter, which needs the base that use_peft keeps; set that, or name a model"
        if is_made_later(path):
            continue
        if path is not None and not is_adapter and config.use_peft and key == "value_model_path":
            yield f"{key}: with use_peft the critic is an adapter of the policy's base, and {path} is none; remove it"


def _round(config: PPOConfig) -> Problems:
    completions = launched_step_size(config) * config.num_mini_batches
    if completions % config.num_generations:
        yield (
            f"num_generations: a round of per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches"
            f"{times_ranks()} = {completions} completions is no whole number of groups of {config.num_generations}; "
            "change one of them"
        )
    if config.target_kl is not None and config.num_ppo_epochs * config.num_mini_batches == 1:
        yield (
            "target_kl: can stop nothing, each round has one update: set num_ppo_epochs or num_mini_batches above 1, "
            "or remove it"
        )


def _sampling(config: PPOConfig) -> Problems:
    if config.temperature == 0:
        yield "temperature: 0 is greedy, and a policy that never tries anything learns nothing; set it above 0"
    if "" in config.stop:
        yield "stop: an empty text would end every completion at once; remove it"
    if config.overlong.buffer > config.max_completion_length:
        yield (
            f"overlong.buffer: {config.overlong.buffer} is longer than max_completion_length "
            f"{config.max_completion_length}; lower it"
        )
    if config.overlong.buffer == 0 and config.overlong.penalty != type(config.overlong)().penalty:
        yield "overlong.penalty: has no effect while overlong.buffer is 0; set a buffer, in tokens"
    longest = config.max_completion_length + (config.rollout.max_prompt_length or 1)
    if config.packing.token_budget < longest:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold one sequence of "
            f"rollout.max_prompt_length + max_completion_length = {longest} tokens; raise it"
        )


def _kl(config: PPOConfig) -> Problems:
    if config.kl_coef > 0:
        if config.adaptive_kl_target is None and config.adaptive_kl_horizon != PPOConfig.adaptive_kl_horizon:
            yield "adaptive_kl_horizon: has no effect without adaptive_kl_target; set that too"
        return
    if config.adaptive_kl_target is not None:
        yield "adaptive_kl_target: steers kl_coef, which must start above 0; set it, such as 0.05"
    if config.kl_estimator != PPOConfig.kl_estimator:
        yield "kl_estimator: has no effect while kl_coef is 0; set kl_coef, or remove it"


def _pretraining(config: PPOConfig) -> Problems:
    yield from dataset_problem("pretrain_dataset", config.pretrain_dataset)
    if config.pretrain_dataset is None and config.ptx_coef > 0:
        yield "ptx_coef: has no effect without pretrain_dataset; set that too"
    if config.pretrain_dataset is not None and config.ptx_coef == 0:
        yield "pretrain_dataset: has no effect while ptx_coef is 0; set its weight, such as 1"
    if config.pretrain_dataset is None and config.pretrain_batch_size is not None:
        yield "pretrain_batch_size: has no effect without pretrain_dataset; set that too"
    if config.pretrain_dataset is not None and config.packing.token_budget < config.pretrain_max_length - 1:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold one row of pretrain_max_length "
            f"{config.pretrain_max_length}; raise it, or lower pretrain_max_length"
        )
