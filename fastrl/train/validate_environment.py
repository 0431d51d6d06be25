"""Rules for environments and tools; nothing here imports torch, nor the user's modules."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from fastrl.train.config import EnvironmentBlock, GRPOConfig, OnlineDPOConfig, OnPolicyConfig
from fastrl.train.validate_rewards import imported_problem

BUILT_IN_TOOLS = ("calculator", "python", "search")


def environment_problems(config: OnPolicyConfig) -> Iterator[str]:
    """Names that do not exist, and settings that have nothing to act on."""
    block, default = config.environment, EnvironmentBlock()
    if block.factory is not None:
        yield from _named("environment.factory", block.factory)
    for spec in block.tools:
        if spec.partition("(")[0] not in BUILT_IN_TOOLS:
            yield from _named("environment.tools", spec)
    if block.factory is None and not block.tools:
        for key in vars(default):
            if getattr(block, key) != getattr(default, key):
                yield f"environment.{key}: has no effect without tools; set environment.factory or environment.tools"
        return
    if isinstance(config, OnlineDPOConfig):
        yield "environment: online_dpo compares single answers; use grpo or ppo for agents"
    yield from _turns(config)
    if block.factory is None and block.reward_weight != default.reward_weight:
        yield "environment.reward_weight: weighs the reward of environment.factory; set that too"


def _turns(config: OnPolicyConfig) -> Iterator[str]:
    block = config.environment
    key = "environment.turn_advantage_weight"
    if block.turn_advantage_weight == 0:
        if block.turn_gamma != EnvironmentBlock().turn_gamma:
            yield f"environment.turn_gamma: has no effect while {key.partition('.')[2]} is 0; set that too"
    elif not isinstance(config, GRPOConfig):
        yield f"{key}: turns are credited by the recipe grpo alone; set 0"
    elif config.parity is not None or config.algorithm == "reinforce_pp" or config.kl_placement == "reward":
        yield f"{key}: has no place where advantages are made per token (whitening, a KL in the reward); set 0"


def _named(key: str, spec: str) -> Iterator[str]:
    place, colon, name = spec.partition("(")[0].rpartition(":")
    if colon:
        yield from imported_problem(key, spec, place, name)
        return
    near = get_close_matches(name, BUILT_IN_TOOLS, n=1, cutoff=0.5) if key.endswith("tools") else []
    hint = f"; did you mean {near[0]}?" if near else ""
    yield f"{key}: {spec}: write package.module:name or path/to/file.py:name{hint}"
