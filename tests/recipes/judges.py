"""Reward functions with a signal on random completions, and ones that misbehave; named in configurations."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from fastrl.rewards import promises


def digit_sum(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number in [0, 1) that depends on the sampled tokens alone."""
    return [sum(ids) % 8 / 8 for ids in completion_ids]


def is_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """0 or 1, so that some groups of two have no signal."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def is_long(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 where the completion reached four tokens."""
    return [float(len(ids) >= 4) for ids in completion_ids]


def nothing(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """No group has a signal."""
    return [0.5] * len(completion_ids)


@promises(whole_batch=True)
def no_verdict_on_the_first_of_four(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """None, NaN and numbers, as a judge that sometimes abstains and sometimes breaks."""
    values: list[float | None] = [float(sum(ids) % 8) for ids in completion_ids]
    values[0::4] = [None] * len(values[0::4])
    values[1::8] = [float("nan")] * len(values[1::8])
    return values


def broken(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A bug of a user's."""
    raise KeyError("no such answer")


def step_number(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
    """The optimizer steps taken so far, of at most max_steps."""
    assert trainer_state.global_step < trainer_state.max_steps
    assert trainer_state.epoch >= 0
    return [float(trainer_state.global_step)] * len(completions)


@promises(per_item=True)
def hangs_and_crashes(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """About a quarter of the calls never return, and a quarter take their process with them."""
    for ids in completion_ids:
        if sum(ids) % 4 == 0:
            time.sleep(3600)
        if sum(ids) % 4 == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return [float(sum(ids) % 8) for ids in completion_ids]


def sometimes(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    """0 or 1, and a failure on about a third of the completions."""
    return [ValueError("no") if sum(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]


def falls_silent(completions: list[Any], trainer_state: Any, **_: Any) -> list[float]:
    """The number of characters in the first two steps, then nothing that tells completions apart."""
    if trainer_state.global_step < 2:
        return [float(len(completion[-1]["content"])) for completion in completions]
    return [0.5] * len(completions)
