"""Procedural tasks of the package reasoning-gym: rows to train on, and the task's own verifier as a reward.

Source: Stojanovski et al. 2025, arXiv:2505.24760.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.rewards.text import completion_text, final_answer


def reasoning_gym_rows(
    task: str, *, size: int, seed: int, config: Mapping[str, object] | None = None
) -> list[dict[str, Any]]:
    """`size` problems of one task, the same for the same seed.

    Args:
        task: a name of reasoning-gym: "leg_counting", "countdown", ...
        config: the task's own parameters, such as `{"max_animals": 5}`.

    Returns:
        Rows with `prompt`, `answer`, `task`, and `entry`: what the task's verifier needs.

    Raises:
        RuntimeError: reasoning-gym is not installed.
        ValueError: reasoning-gym refuses the task or its parameters.
    """
    options = {"size": size, "seed": seed, **(config or {})}
    try:
        dataset = _package().create_dataset(task, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym refuses the task {task!r} with {options}: {error}") from error
    return [{"prompt": entry["question"], "answer": entry["answer"], "task": task, "entry": entry} for entry in dataset]


def reasoning_gym(
    completions: Sequence[object], task: Sequence[str], entry: Sequence[Mapping[str, Any]], **_: object
) -> list[float]:
    """The score in [0, 1] that each row's task gives to the answer part of the completion; no answer is 0.0.

    Args:
        completions: [S] strings or message lists; `final_answer` says which part is judged.
        task: [S] task names, as `reasoning_gym_rows` made them.
        entry: [S] the rows' entries.
    """
    package = _package()
    return [
        float(package.get_score_answer_fn(name)(answer=final_answer(completion_text(completion)), entry=problem))
        for completion, name, problem in zip(completions, task, entry, strict=True)
    ]


def _package() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise RuntimeError("reasoning_gym tasks need a package: pip install 'reasoning-gym>=0.1.23'") from error
