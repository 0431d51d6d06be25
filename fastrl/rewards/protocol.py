"""What a reward is: a function with TRL's signature, its weight in the sum, and its name in the log.

    f(prompts, completions, completion_ids, **columns) -> list of S values

A value is a number; None where the function does not judge the item; or an exception, where judging this one item
failed. The function may be `async`. Columns are the dataset's, one value per completion. A function that names
`trainer_state`, `log_extra(column, values)` or `log_metric(name, value)`, or takes `**kwargs`, is given those too; in
a run with environments `environments` as well, what is left of each (`environment_reward.FinishedEnvironment`).

What a function promises about itself (`promises`) decides where it runs and how its batches are cut: see
`fastrl.rewards.workers`.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

RewardFunction = Callable[..., Any]
Function = TypeVar("Function", bound=RewardFunction)

# Keyword arguments that every call offers; a dataset column cannot have one of these names.
STANDARD_INPUTS = (
    "prompts",
    "completions",
    "completion_ids",
    "environments",
    "trainer_state",
    "log_extra",
    "log_metric",
)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a reward function promises about itself; of one that promises nothing, nothing is assumed.

    Attributes:
        in_process: it never hangs, crashes or calls foreign code, and is cheaper than a message to a worker.
        per_item: an item's value depends on that item alone, so that batches may be cut anywhere. Without it, the
            completions of one prompt are judged in one call, as functions that compare them need.
        pure: per_item, the same named arguments always give the same value, and it logs nothing: results are kept.
        whole_batch: it compares completions of different prompts: one call judges the batch, one failure takes it.
    """

    in_process: bool = False
    per_item: bool = False
    pure: bool = False
    whole_batch: bool = False

    def __post_init__(self) -> None:
        if self.whole_batch and (self.per_item or self.pure):
            raise ValueError("a reward that needs the whole batch cannot promise per_item or pure")


def promises(
    *, in_process: bool = False, per_item: bool = False, pure: bool = False, whole_batch: bool = False
) -> Callable[[Function], Function]:
    """Decorate a reward function, or a class of them, with what it promises; see `Traits`."""
    traits = Traits(in_process=in_process, per_item=per_item, pure=pure, whole_batch=whole_batch)

    def decorate(function: Function) -> Function:
        function.reward_traits = traits  # type: ignore[attr-defined]
        return function

    return decorate


def traits_of(function: RewardFunction) -> Traits:
    """What the function, or the one inside its partials, promises."""
    found = getattr(unwrapped(function), "reward_traits", None)
    return found if isinstance(found, Traits) else Traits()


@dataclass(frozen=True, slots=True)
class Reward:
    """One reward function of a run.

    Attributes:
        function: see the module's docstring.
        weight: factor of its values in the sum; finite. 0 logs the reward without training on it.
        name: its name in metrics and errors; the function's own name when empty.
        spec: what `resolve_reward` makes the function from in another process; found by itself for a function that
            can be imported, empty for one that cannot (a closure, a partial), which judges in this process.
    """

    function: RewardFunction
    weight: float = 1.0
    name: str = ""
    spec: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward {self.name or self.function!r} must be finite, got {self.weight}")
        if not self.name:
            object.__setattr__(self, "name", function_name(self.function))
        if not self.spec:
            object.__setattr__(self, "spec", import_spec(self.function))


def import_spec(function: RewardFunction) -> str:
    """`module:name` when importing that gives this very function, else ""."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not isinstance(module, str) or module == "__main__" or name.startswith("_"):
        return ""
    return f"{module}:{name}" if vars(sys.modules.get(module, sys)).get(name) is function else ""


def unwrapped(function: RewardFunction) -> RewardFunction:
    """The function inside any number of `functools.partial`."""
    while isinstance(function, partial):
        function = function.func
    return function


def function_name(function: RewardFunction) -> str:
    """TRL's name of a reward function: that of the wrapped function, or of the class of a callable object."""
    inner = unwrapped(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def is_async(function: RewardFunction) -> bool:
    """Whether calling it returns a coroutine; looks through partials and at a callable object's `__call__`."""
    inner = unwrapped(function)
    # On a function, `__call__` is a method wrapper and never a coroutine function.
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter] | None:
    """The parameters by name; None when the function takes `**kwargs` or cannot be inspected: offer it everything."""
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values()):
        return None
    return found


def missing_inputs(function: RewardFunction, offered: set[str]) -> list[str]:
    """Parameters without a default that no offered input fills."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        parameter.name
        for parameter in found
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and parameter.default is inspect.Parameter.empty
        and parameter.name not in offered
    ]
