"""From the names in a configuration to rewards, and the checks of a dataset that must pass before training.

A spec is one of
    numeric                        a built-in reward
    length(limit=200, start=100)   a built-in reward, or any class or factory, with literal options
    package.module:function        a function that can be imported
    rewards/mine.py:function       a function in a file
    verl:SPEC                      verl's compute_score behind one of the two above
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl.rewards.code_reward import CodeReward
from fastrl.rewards.constraints import constraints
from fastrl.rewards.constraints import parsed as parsed_constraints
from fastrl.rewards.exact_match import exact_match, gold_text
from fastrl.rewards.format import think_format
from fastrl.rewards.items import gold_items, sequence_equality, set_equality
from fastrl.rewards.json_schema import JsonSchema, check_schema, json_schema
from fastrl.rewards.judge import Judge
from fastrl.rewards.language import Language
from fastrl.rewards.learned import ProcessRewardModel, RewardModel
from fastrl.rewards.length import Length
from fastrl.rewards.math_reward import math_gold, math_reward
from fastrl.rewards.multiple_choice import gold_letter, multiple_choice
from fastrl.rewards.numeric import gold_number, numeric
from fastrl.rewards.protocol import STANDARD_INPUTS, Reward, RewardFunction, function_name, missing_inputs, unwrapped
from fastrl.rewards.reasoning_gym import reasoning_gym
from fastrl.rewards.regex import Regex, compiled, regex
from fastrl.rewards.repetition import Repetition
from fastrl.rewards.spec import imported, parsed
from fastrl.rewards.sudoku import check_puzzle, sudoku
from fastrl.rewards.tags import TagCounts
from fastrl.rewards.verifier_gate import check_verifiers
from fastrl.rewards.verl import VerlReward, verl_reward

BUILT_IN: Mapping[str, RewardFunction] = {
    "numeric": numeric,
    "exact_match": exact_match,
    "math_reward": math_reward,
    "format": think_format,
    "length": Length,
    "reasoning_gym": reasoning_gym,
    "code": CodeReward,
    "judge": Judge,
    "reward_model": RewardModel,
    "process_reward_model": ProcessRewardModel,
    "multiple_choice": multiple_choice,
    "regex": regex,
    "json_schema": json_schema,
    "set_equality": set_equality,
    "sequence_equality": sequence_equality,
    "sudoku": sudoku,
    "constraints": constraints,
    "tag_count": TagCounts,
    "language": Language,
    "repetition": Repetition,
}
# What the name means with options, where it is a function of a column without them.
WITH_OPTIONS: Mapping[str, type] = {"regex": Regex, "json_schema": JsonSchema}

# Rewards that cannot judge every row, the column that decides, and what raises on a value they cannot judge.
_GOLD_CHECKS: tuple[tuple[RewardFunction, str, Callable[[object], object]], ...] = (
    (numeric, "answer", gold_number),
    (exact_match, "answer", gold_text),
    (math_reward, "answer", math_gold),
    (multiple_choice, "answer", gold_letter),
    (set_equality, "answer", gold_items),
    (sequence_equality, "answer", gold_items),
    (regex, "pattern", compiled),
    (json_schema, "schema", check_schema),
    (sudoku, "puzzle", check_puzzle),
    (constraints, "constraints", parsed_constraints),
)


def resolve_rewards(specs: Sequence[str], weights: Sequence[float] | None = None) -> list[Reward]:
    """The rewards of a run.

    Args:
        specs: see the module's docstring.
        weights: one per spec; None weighs all by 1.

    Raises:
        ValueError: no spec, an unknown one, or as many weights as specs are not given.
    """
    if not specs:
        raise ValueError(
            f"reward_funcs is empty; name at least one of {', '.join(BUILT_IN)}, or package.module:function"
        )
    if weights is not None and len(weights) != len(specs):
        raise ValueError(f"reward_weights must have one number per reward: {len(specs)}, got {len(weights)}")
    rewards: list[Reward] = []
    for spec, weight in zip(specs, weights or [1.0] * len(specs), strict=True):
        function, short = resolve_reward(spec), spec.partition("(")[0]
        name = short if short in BUILT_IN else function_name(function)
        taken = any(reward.name == name for reward in rewards)
        rewards.append(Reward(function, weight, spec if taken else name, spec))
    return rewards


def resolve_reward(spec: str) -> RewardFunction:
    """The reward function a spec names; see the module's docstring.

    Raises:
        ValueError: the name, the module, the file or the attribute does not exist, or it is not callable.
    """
    if spec.startswith("verl:"):
        return verl_reward(resolve_reward(spec.removeprefix("verl:")))
    target, options = parsed(spec, "reward")
    found = BUILT_IN.get(target) if options is None else WITH_OPTIONS.get(target, BUILT_IN.get(target))
    if found is None:
        found = _imported(target)
    if not callable(found):
        raise ValueError(f"reward {spec!r} is not a function but {type(found).__name__}")
    if options is None and not isinstance(found, type):
        return found
    try:
        made = found(**(options or {}))
    except TypeError as error:
        raise ValueError(f"reward {spec!r} cannot be made: {error}") from error
    if not callable(made):
        raise ValueError(f"reward {spec!r} made {type(made).__name__}, which is not a function")
    return made  # type: ignore[no-any-return]


def check_rewards(rewards: Sequence[Reward], columns: Mapping[str, Sequence[object]]) -> None:
    """Refuse, before training, data that a reward will not be able to judge.

    Args:
        rewards: those of the run.
        columns: the whole dataset, name -> values.

    Raises:
        ValueError: a column a reward needs is missing, or a gold answer cannot be judged. Names the first bad row,
            counted from 1 as everywhere, and how many there are. Or a verifier fails its gate: see
            `fastrl.rewards.verifier_gate`.
    """
    for reward in rewards:
        missing = missing_inputs(reward.function, {*columns, *STANDARD_INPUTS})
        if isinstance(reward.function, Judge):
            missing += [name for name in reward.function.needs if name not in columns]
        if missing:
            raise ValueError(
                f"reward {reward.name!r} needs the column {missing[0]!r}; the data has: {', '.join(columns)}. "
                f"Rename one with data.columns: {{{missing[0]}: <its name in the file>}}"
            )
        if isinstance(reward.function, VerlReward) and not {"ground_truth", "reward_model"} & set(columns):
            raise ValueError(
                f"reward {reward.name!r} needs the column 'ground_truth', or verl's 'reward_model' with it inside; "
                f"the data has: {', '.join(columns)}"
            )
        if isinstance(reward.function, CodeReward):
            _check_gold(reward.name, reward.function.check, columns["tests"])
        for function, column, check in _GOLD_CHECKS:
            if unwrapped(reward.function) is function:
                _check_gold(reward.name, check, columns[column])
    check_verifiers(rewards, columns)


def _check_gold(name: str, check: Callable[[object], object], golds: Sequence[object]) -> None:
    bad: list[tuple[int, str]] = []
    for row, gold in enumerate(golds, 1):
        try:
            check(gold)
        except ValueError as error:
            bad.append((row, str(error)))
    if bad:
        row, reason = bad[0]
        raise ValueError(
            f"reward {name!r} cannot judge {len(bad)} of {len(golds)} rows; the first is row {row}: {reason}. "
            "Remove these rows, or use another reward"
        )


def _imported(target: str) -> Any:
    if ":" not in target:
        near = difflib.get_close_matches(target, BUILT_IN, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown reward {target!r}. {hint}Built in: {', '.join(BUILT_IN)}; others are package.module:function "
            "or path/to/file.py:function"
        )
    return imported(target, "reward")
