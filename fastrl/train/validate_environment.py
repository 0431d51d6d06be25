"""Rules for environments and tools; nothing here imports torch, nor the user's modules."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from fastrl.train.config import EnvironmentBlock, OnPolicyConfig
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
    elif block.factory is None and block.reward_weight != default.reward_weight:
        yield "environment.reward_weight: weighs the reward of environment.factory; set that too"


def _named(key: str, spec: str) -> Iterator[str]:
    place, colon, name = spec.partition("(")[0].rpartition(":")
    if colon:
        yield from imported_problem(key, spec, place, name)
        return
    near = get_close_matches(name, BUILT_IN_TOOLS, n=1, cutoff=0.5) if key.endswith("tools") else []
    hint = f"; did you mean {near[0]}?" if near else ""
    yield f"{key}: {spec}: write package.module:name or path/to/file.py:name{hint}"
