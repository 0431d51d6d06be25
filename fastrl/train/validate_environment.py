"""Rules for environments and tools; nothing here imports torch, nor the user's modules."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from fastrl.rewards.spec import parsed
from fastrl.rollout.tools.search import check_options
from fastrl.train.config import (
    EnvironmentBlock,
    EvalConfig,
    GenerateConfig,
    GRPOConfig,
    OnlineDPOConfig,
    OnPolicyConfig,
)
from fastrl.train.config.pipeline import is_made_later
from fastrl.train.contents import quoted
from fastrl.train.environment_verifiers import check_installed
from fastrl.train.tiny_files import CORPORA, is_tiny, tiny_problem
from fastrl.train.validate_environment_source import source_problems
from fastrl.train.validate_rewards import imported_problem

BUILT_IN_TOOLS = ("calculator", "python", "search")
OWN_REWARD = "environment"  # the name, under verify, of what an environment's get_reward says


def environment_problems(config: OnPolicyConfig) -> Iterator[str]:
    """Names that do not exist, and settings that have nothing to act on."""
    block = config.environment
    yield from _settings(block)
    if not _is_used(block):
        return
    if isinstance(config, OnlineDPOConfig):
        yield "environment: online_dpo compares single answers; use grpo or ppo for agents"
    yield from _turns(config)


def played_problems(config: EvalConfig | GenerateConfig) -> Iterator[str]:
    """The same for the recipes that only sample: what weighs rewards against each other has little to act on."""
    block, default = config.environment, EnvironmentBlock()
    yield from _settings(block)
    if isinstance(config, GenerateConfig) and OWN_REWARD in config.verify and block.factory is None:
        yield f"verify: {OWN_REWARD} is the reward of environment.factory; set that too"
    if not _is_used(block):
        return
    for key in ("turn_advantage_weight", "turn_gamma"):
        if getattr(block, key) != getattr(default, key):
            yield f"environment.{key}: has no effect where nothing is trained; remove it"
    if block.factory is not None and block.reward_weight != default.reward_weight:
        if isinstance(config, EvalConfig):
            yield "environment.reward_weight: has no effect, as eval reports every reward by itself; remove it"
        elif OWN_REWARD not in config.verify:
            yield f"environment.reward_weight: has no effect while verify does not name {OWN_REWARD}; add it"


def _is_used(block: EnvironmentBlock) -> bool:
    return block.factory is not None or bool(block.tools)


def _settings(block: EnvironmentBlock) -> Iterator[str]:
    default = EnvironmentBlock()
    if block.factory is not None and block.factory.partition("(")[0] == "verifiers":
        yield from _verifiers_problem()
    elif block.factory is not None:
        yield from _named("environment.factory", block.factory)
    for spec in block.tools:
        if spec.partition("(")[0] not in BUILT_IN_TOOLS:
            yield from _named("environment.tools", spec)
        else:
            yield from _built_in(spec)
        for option in filter(is_tiny, quoted(spec)):
            yield from tiny_problem("environment.tools", option, CORPORA)
    if not _is_used(block):
        for key in vars(default):
            if getattr(block, key) != getattr(default, key):
                yield f"environment.{key}: has no effect without tools; set environment.factory or environment.tools"
    elif block.factory is None and block.reward_weight != default.reward_weight:
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


def _verifiers_problem() -> Iterator[str]:
    try:
        check_installed()
    except RuntimeError as error:
        yield f"environment.factory: {error}"


def _built_in(spec: str) -> Iterator[str]:
    """Options that the tool does not take, lacks, or that name no file."""
    from fastrl.train.environment_spec import BUILT_IN, bound  # lazily: most runs have no tools

    try:
        target, options = parsed(spec, "environment.tools:")
        bound(BUILT_IN[target], options or {}, spec, "environment.tools")
        if target == "search":
            corpus = (options or {})["corpus"]
            if not is_made_later(corpus) and not (isinstance(corpus, str) and is_tiny(corpus)):
                check_options(**(options or {}))
    except ValueError as error:
        yield str(error) if str(error).startswith("environment.tools:") else f"environment.tools: {spec}: {error}"


def _named(key: str, spec: str) -> Iterator[str]:
    place, colon, name = spec.partition("(")[0].rpartition(":")
    if colon:
        problems = list(imported_problem(key, spec, place, name))
        yield from problems or source_problems(key, spec, place, name)
        return
    near = get_close_matches(name, BUILT_IN_TOOLS, n=1, cutoff=0.5) if key.endswith("tools") else []
    hint = f"; did you mean {near[0]}?" if near else ""
    yield f"{key}: {spec}: write package.module:name or path/to/file.py:name{hint}"
