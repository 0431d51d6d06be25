"""Episodes of a run, from its configuration: the tokenizer's format, tools and schemas, where environments live."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from fastrl.data.observation import observer, opened_prompt, with_observation
from fastrl.data.tool_calls import turn_parser
from fastrl.rewards.environment_reward import environment_reward
from fastrl.rewards.protocol import Reward
from fastrl.rewards.resolve import resolve_rewards
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.environment import missing_columns
from fastrl.rollout.episodes import Dialogue, Environments, Episode, Limits, Start, play
from fastrl.train.config import EnvironmentBlock, EvalConfig, GenerateConfig, OnPolicyConfig
from fastrl.train.environment_spec import EnvironmentSpec, environment_spec, is_built_in
from fastrl.train.environment_workers import EnvironmentWorkers, ToolsAside
from fastrl.train.local_environments import LocalEnvironments
from fastrl.train.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Player:
    """What turns prompts into episodes.

    Attributes:
        environments: where they live.
        dialogue: how turns and results become tokens.
        limits: what ends an episode.
        schemas: of the tools, as the prompts show them.
        tokenizer: renders prompts that `reset` adds to.
    """

    environments: Environments
    dialogue: Dialogue
    limits: Limits
    schemas: list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase

    def play(
        self, engine: Engine, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling
    ) -> list[Episode]:
        """Play one episode per prompt, in order."""
        starts = [
            Start(
                prompt.ids,
                {"prompt": prompt.prompt, **prompt.columns},
                seed,
                partial(opened_prompt, self.tokenizer, messages_of(prompt), tools=self.schemas),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return play(engine, self.environments, self.dialogue, starts, sampling, self.limits)


def has_environment(block: EnvironmentBlock) -> bool:
    """Whether a configuration asks for episodes with tools."""
    return block.factory is not None or bool(block.tools)


def player_of(
    config: OnPolicyConfig | EvalConfig | GenerateConfig, tokenizer: PreTrainedTokenizerBase
) -> Player | None:
    """Return what plays the episodes of a run; None when its configuration has no environment.

    Raises:
        ValueError: an environment or tool that cannot be made, or a chat template without a place for tools.
    """
    block = config.environment
    if not has_environment(block):
        return None
    model = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    context = getattr(model.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    spec = environment_spec(block)
    if block.turn_advantage_weight > 0 and not callable(getattr(spec.owner, "get_turn_reward", None)):
        raise ValueError("environment.turn_advantage_weight needs a method get_turn_reward of the environment")
    schemas = spec.schemas()
    return Player(
        environments=environments_of(block),
        dialogue=Dialogue(
            parse=turn_parser(tokenizer, schemas or None),
            observe=observer(tokenizer, has_tools=bool(schemas)),
            control_ids=frozenset(tokenizer.all_special_ids),
            replies=spec.replies,
            longest_token=max(map(len, tokenizer.get_vocab())),
        ),
        limits=Limits(context, block.max_tool_calling_iterations, block.episode_seconds),
        schemas=schemas,
        tokenizer=tokenizer,
    )


def environments_of(block: EnvironmentBlock) -> Environments:
    """Where the environments of a configuration live; `block.workers` says.

    Raises:
        RuntimeError: the interpreter is among the tools, and there is no sandbox for it.
    """
    here = tuple(tool for tool in block.tools if is_built_in(tool))
    tools = environment_spec(EnvironmentBlock(tools=here)).make()  # what they lack is said now, not in each episode
    if block.workers == 0:
        return LocalEnvironments(environment_spec(block))
    away = [tool for tool in block.tools if not is_built_in(tool)]
    environments: Environments = LocalEnvironments(EnvironmentSpec(None, None, ()))
    if block.factory is not None or away:
        seconds = block.tool_timeout_seconds
        environments = EnvironmentWorkers(block.factory, away, workers=block.workers, seconds=seconds)
    if not here:
        return environments
    return ToolsAside(tools, environments, workers=block.workers)


def tool_schemas(block: EnvironmentBlock) -> list[dict[str, Any]] | None:
    """The schemas that prompts are rendered with; None when the configuration has no environment."""
    return environment_spec(block).schemas() if has_environment(block) else None


def rewards_of(config: OnPolicyConfig) -> list[Reward]:
    """The reward functions of a run, and after them the environment's own reward under its class's name; may be []."""
    named = resolve_rewards(config.reward_funcs, config.reward_weights) if config.reward_funcs else []
    return [*named, *own_reward(config.environment)]


def own_reward(block: EnvironmentBlock) -> list[Reward]:
    """What the environment says itself, under its class's name; [] when its class has no get_reward."""
    owner = environment_spec(block).owner if block.factory is not None else None
    if owner is None or not callable(getattr(owner, "get_reward", None)):
        return []
    return [Reward(environment_reward, block.reward_weight, owner.__name__)]


def specs_of(block: EnvironmentBlock) -> list[str]:
    """What names files that a run depends on, for `fastrl.train.contents.contents_of`."""
    return [*([] if block.factory is None else [block.factory]), *block.tools]


def check_columns(block: EnvironmentBlock, columns: Collection[str]) -> None:
    """Refuse data that lacks a column the environment's `reset` needs.

    Raises:
        ValueError: naming the first.
    """
    owner = environment_spec(block).owner if block.factory is not None else None
    reset = getattr(owner, "reset", None)
    missing = [] if reset is None else missing_columns(reset, [*columns, "prompt"])
    if missing:
        raise ValueError(
            f"reset of the environment needs the column {missing[0]!r}; the data has: {', '.join(columns)}. Rename "
            f"one with data.columns: {{{missing[0]}: <its name in the file>}}"
        )


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of a prompt, which `check_prompts` has seen to be a conversation."""
    assert not isinstance(prompt.prompt, str)
    return prompt.prompt


def opened(prompt: Prompt, episode: Episode) -> str | list[dict[str, Any]]:
    """The prompt as reward functions and readers see it: with what `reset` said."""
    if episode.observation is None:
        return prompt.prompt
    return with_observation(messages_of(prompt), episode.observation)


def record_of(episode: Episode) -> Mapping[str, Any]:
    """An environment's last state as `fastrl.rewards.environment_reward.FinishedEnvironment` reads it."""
    return {"state": episode.state, "reward": episode.reward}
