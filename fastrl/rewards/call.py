"""The one place where reward functions run: everything they can do wrong becomes a fault with a name.

`call_rewards` takes and returns plain values, so that it can move into a worker process that may be killed.
"""

from __future__ import annotations

import asyncio
import copy
import math
import traceback
from collections.abc import Coroutine, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from fastrl.rewards.finished import FinishedEnvironment
from fastrl.rewards.protocol import RewardFunction, function_name, is_async, parameters

LARGEST_REWARD = 3.4028234663852886e38  # float32's: rewards become float32 tensors, where more is infinite


@dataclass(frozen=True, slots=True)
class Fault:
    """An item that could not be judged, and why. It is not a reward of 0: it leaves the training batch."""

    message: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one reward function said about a batch.

    Attributes:
        values: [S] a finite number, None where it does not judge, or a Fault.
        extra: column name -> [S] what it gave to `log_extra`.
        metrics: metric name -> the values it gave to `log_metric`.
    """

    values: list[float | Fault | None]
    extra: dict[str, list[object]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


def call_rewards(functions: Sequence[RewardFunction], inputs: Mapping[str, Any]) -> list[Judgement]:
    """Call every function once on the whole batch; async ones run together after the others.

    Args:
        functions: see `fastrl.rewards.protocol`.
        inputs: name -> value of every keyword argument on offer but the loggers; `completions` is [S].

    Returns:
        One judgement per function, in order. Nothing a function raises escapes, except interrupts.
    """
    judgements = [Judgement([]) for _ in functions]
    waiting: list[Coroutine[Any, Any, None]] = []
    for function, judgement in zip(functions, judgements, strict=True):
        if is_async(function):
            waiting.append(_judge_async(function, inputs, judgement))
        else:
            _judge(function, inputs, judgement)
    if waiting:
        _run_together(waiting)
    return judgements


def _judge(function: RewardFunction, inputs: Mapping[str, Any], judgement: Judgement) -> None:
    size = len(inputs["completions"])
    try:
        values = _checked(function_name(function), function(**_arguments(function, inputs, judgement)), size)
    except (Exception, SystemExit):  # a reward that calls exit() must not end the run with its own code
        values = [Fault(traceback.format_exc())] * size
    judgement.values.extend(values)


async def _judge_async(function: RewardFunction, inputs: Mapping[str, Any], judgement: Judgement) -> None:
    size = len(inputs["completions"])
    try:
        values = _checked(function_name(function), await function(**_arguments(function, inputs, judgement)), size)
    except (Exception, SystemExit):  # a reward that calls exit() must not end the run with its own code
        values = [Fault(traceback.format_exc())] * size
    judgement.values.extend(values)


def _run_together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    async def together() -> None:
        await asyncio.gather(*coroutines)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(together())
        return
    # A notebook's thread already runs a loop, which cannot be entered twice.
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(asyncio.run, together()).result()


def _arguments(function: RewardFunction, inputs: Mapping[str, Any], judgement: Judgement) -> dict[str, Any]:
    """The inputs the function takes. Lists are copies: a function that sorts its argument harms nobody else."""
    size = len(inputs["completions"])

    def log_extra(column: str, values: Sequence[object]) -> None:
        if len(values) != size:
            raise ValueError(f"log_extra({column!r}) needs one value per completion: {size}, got {len(values)}")
        judgement.extra[column] = list(values)

    def log_metric(name: str, value: float) -> None:
        judgement.metrics.setdefault(name, []).append(float(value))

    offered = {**inputs, "log_extra": log_extra, "log_metric": log_metric}
    named = parameters(function)
    return {name: _own_copy(name, value) for name, value in offered.items() if named is None or name in named}


def _own_copy(name: str, value: Any) -> Any:
    if name == "environments":
        return [FinishedEnvironment(_copied(record)) for record in value]
    if name == "completion_ids":
        return [list(ids) for ids in value]
    return _copied(value) if isinstance(value, list) else value  # not trainer_state and the loggers


def _copied(value: Any) -> Any:
    """A deep copy; five times faster than copy.deepcopy on what JSON can hold, as it keeps no record of what it saw."""
    kind = type(value)
    if kind in (str, int, float, bool, NoneType):
        return value
    if kind is list:
        return [_copied(item) for item in value]
    if kind is dict:
        return {key: _copied(item) for key, item in value.items()}
    return copy.deepcopy(value)


def _checked(name: str, output: Any, size: int) -> list[float | Fault | None]:
    """A function's output as [S] values; faults for all items when its shape is wrong, else for the wrong items."""
    if output is None or isinstance(output, str | bytes | Mapping | Set):
        kind = type(output).__name__
        return [Fault(f"reward {name!r} must return a list with one value per completion, got {kind}")] * size
    values = list(output)
    if len(values) != size:
        return [Fault(f"reward {name!r} must return one value per completion: {size}, got {len(values)}")] * size
    return [_checked_value(name, value) for value in values]


def _checked_value(name: str, value: Any) -> float | Fault | None:
    if value is None:
        return None
    if isinstance(value, Exception):
        return Fault("".join(traceback.format_exception(value)))
    if isinstance(value, str | bytes):
        return Fault(f"reward {name!r} must return numbers or None, got {value!r:.80}")
    try:
        number = float(value)  # also NumPy's and torch's scalars
    except Exception:  # whatever the user's object raises, it is a counted failure of this item
        return Fault(f"reward {name!r} must return numbers or None, got {type(value).__name__}")
    if not math.isfinite(number) or abs(number) > LARGEST_REWARD:
        return Fault(f"reward {name!r} returned {number}, which is not a finite float32")
    return number
