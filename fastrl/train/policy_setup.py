"""What a GRPO run computes with, from its configuration: data first, then models, so that bad rows cost no loading."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.rewards.gates import check_gates, gates_from
from fastrl.rewards.protocol import Reward
from fastrl.rollout.builtin import context_length
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.seeds import request_seed
from fastrl.train.algorithm import algorithm_from
from fastrl.train.collect import Sampler
from fastrl.train.config import GRPOConfig, OnPolicyConfig
from fastrl.train.curriculum import check_schedule, scheduled
from fastrl.train.device import check_backend, pick_device
from fastrl.train.engine import opened_engine
from fastrl.train.environments import check_columns, player_of, rewards_of, tool_schemas
from fastrl.train.from_config import model_of, optimizer_of, reference_of
from fastrl.train.learned_rewards import loaded
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.prompts import Prompt, columns_of, load_prompts
from fastrl.train.reward_workers import workers_of
from fastrl.train.shares import step_size
from fastrl.train.snapshot import Progress


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run computes with; made once, before the first round.

    Attributes:
        prompts: the pool that rounds draw from.
        held_out: prompts for evaluation; may be empty.
        algorithm: the record of choices.
        policy: the model that is trained.
        reference: its frozen start, with the adapter off; None when the algorithm has no KL.
        optimizer: owns the policy's master weights.
        sampler: engine, rewards and sampling parameters.
        groups: prompts of one round.
        total_steps: optimizer steps of the whole run.
    """

    prompts: list[Prompt]
    held_out: list[Prompt]
    algorithm: PolicyGradient
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    optimizer: MasterAdamW
    sampler: Sampler
    groups: int
    total_steps: int


def set_up(config: GRPOConfig, tokenizer: PreTrainedTokenizerBase, resources: ExitStack) -> Setup:
    """Check the data, then load the models.

    Args:
        resources: closes the engine when the run ends.

    Raises:
        ValueError: an algorithm that does not exist, bad rows, or sequences that will not fit.
    """
    check_backend(config.kernels.backend, pick_device(config.device))
    algorithm = algorithm_from(config)
    rewards = rewards_of(config)
    if not rewards:
        raise ValueError("there is no reward: set reward_funcs, or give the environment's class a method get_reward")
    load = partial(prompts_of, config, tokenizer, rewards, output_dir=config.output_dir)
    prompts = load(config.train_dataset)
    held_out = load(config.eval_dataset) if config.eval_dataset else []
    policy = model_of(config, gradient_checkpointing=config.gradient_checkpointing)
    check_lengths(config, prompts + held_out, context=context_length(policy))
    engine = resources.enter_context(opened_engine(config, policy, tokenizer))
    groups = step_size(config) * config.steps_per_generation // config.num_generations
    rounds = ceil(config.num_train_epochs * len(prompts) / groups)
    steps_of_rounds = rounds * config.steps_per_generation * config.num_iterations
    return Setup(
        prompts=prompts,
        held_out=held_out,
        algorithm=algorithm,
        policy=policy,
        reference=reference_of(config, policy) if algorithm.kl is not None else None,
        optimizer=optimizer_of(config, policy),
        sampler=sampler_of(config, engine, tokenizer, rewards),
        groups=groups,
        total_steps=config.max_steps if config.max_steps > 0 else steps_of_rounds,
    )


def prompts_of(
    config: OnPolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Sequence[Reward],
    path: str,
    *,
    output_dir: str | None,
) -> list[Prompt]:
    """Return the prompts of one of the run's files; `load_prompts` says what is refused."""
    prompts = load_prompts(
        path,
        tokenizer,
        config.data,
        rewards,
        max_prompt_length=config.rollout.max_prompt_length,
        output_dir=output_dir,
        tools=tool_schemas(config.environment),
    )
    check_columns(config.environment, columns_of(prompts))
    return prompts


def sampler_of(
    config: OnPolicyConfig, engine: Engine, tokenizer: PreTrainedTokenizerBase, rewards: Sequence[Reward]
) -> Sampler:
    """Return what samples with the engine and judges its completions.

    Raises:
        ValueError: a gate or a schedule of a reward that the run does not have.
    """
    gates, names = gates_from(config.reward_gates), [reward.name for reward in rewards]
    check_gates(gates, names)
    check_schedule(config.reward_schedule, names)
    return Sampler(
        engine=engine,
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        rewards=loaded(config, tokenizer, rewards),
        sampling=Sampling(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop=config.stop,
        ),
        num_generations=config.num_generations,
        seed=config.seed,
        overlong=config.overlong,
        workers=workers_of(config.rewards),
        gates=gates,
        player=player_of(config, tokenizer),
    )


def sampler_at(sampler: Sampler, config: OnPolicyConfig, progress: Progress) -> Sampler:
    """The sampler of a moment: with the weights of the curriculum, and after a rollback with another seed."""
    seed = sampler.seed if progress.rollbacks == 0 else request_seed(sampler.seed, progress.rollbacks, 0)
    return replace(sampler, rewards=scheduled(sampler.rewards, config.reward_schedule, progress.step), seed=seed)


def served_context(config: OnPolicyConfig, context: int) -> int:
    """Most tokens of one sequence: what the model holds, or less where the engine is told to hold less."""
    served = {"vllm": config.rollout.vllm.max_model_len, "vllm_server": config.rollout.server.max_model_len}
    return min(context, served.get(config.rollout.engine) or context)


def check_lengths(config: OnPolicyConfig, prompts: Sequence[Prompt], *, context: int) -> None:
    """Refuse now what would stop the run hours later, when the longest prompt is drawn.

    Args:
        context: most tokens the model holds, prompt and completion together.

    Raises:
        ValueError: a prompt that leaves no room to sample, or a sequence over the token budget.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    context = served_context(config, context)
    if longest >= context:
        raise ValueError(
            f"the longest prompt has {longest} tokens, which leaves no room to sample in the model's context of "
            f"{context}; shorten it, or set rollout.max_prompt_length to see which rows are too long"
        )
    positions = min(longest + config.max_completion_length, context) - 1  # the last token is predicted, never fed
    if positions > config.packing.token_budget:
        raise ValueError(
            f"the longest prompt has {longest} tokens, so a sequence may take {positions} positions, and "
            f"packing.token_budget is {config.packing.token_budget}; raise it, or lower max_completion_length"
        )
