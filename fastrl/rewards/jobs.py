"""One reward's share of a batch, cut into calls for workers and put together again.

    per_item       calls of a few items: as many as take about CALL_SECONDS, one where an item takes longer
    whole_batch    one call
    otherwise      one call per group, the neighbouring items with one prompt

A call that fails as one is repeated item by item, so that a fault costs its own item and one more call for each item
it was called with; a whole batch is not cut, and fails as one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.rewards.call import Fault, Judgement
from fastrl.rewards.protocol import Reward, Traits, parameters, traits_of

CALL_SECONDS = 0.005  # a message to a worker and back takes 0.2 ms
MOST_ITEMS = 64  # of one call of a per_item function: a fault repeats them all

Result = float | Fault | None


@dataclass(frozen=True, slots=True)
class Call:
    """Some items of a batch, to be judged by one call.

    Attributes:
        batch: whose items they are.
        items: their places in the batch.
        limit: seconds it may take.
    """

    batch: RewardBatch
    items: list[int]
    limit: float


class RewardBatch:
    """The items of a batch that one reward judges, which of them still wait, and what was said of the others.

    Args:
        reward: with a spec.
        function: the number by which workers know it.
        inputs: name -> value of every keyword argument on offer but the loggers.
        timeout_seconds: per item.
    """

    def __init__(self, reward: Reward, function: int, inputs: Mapping[str, Any], *, timeout_seconds: float) -> None:
        self.name = reward.name
        self.traits = traits_of(reward.function)
        self.values: dict[int, Result] = {}
        self._function = function
        self._timeout_seconds = timeout_seconds
        self._size = len(inputs["completions"])
        self._rows: list[str] = []
        self._state = "null"
        self._alone: deque[int] = deque()
        self._waiting: deque[list[int]] = deque()
        self._extra: dict[str, list[object]] = {}
        self._logged: list[tuple[list[int], Mapping[str, list[float]]]] = []
        self._seconds, self._judged = 0.0, 0
        names = _names(reward, self.traits, inputs)
        columns = {name: inputs[name] for name in names if name != "trainer_state"}
        try:
            state = inputs.get("trainer_state") if "trainer_state" in names else None
            self._state = "null" if state is None else json.dumps(dataclasses.asdict(state))
            self._rows = [
                json.dumps({name: column[item] for name, column in columns.items()}) for item in range(self._size)
            ]
        except (TypeError, ValueError, RecursionError) as error:
            message = (
                f"reward {self.name!r} cannot run in a worker, which is sent what JSON can hold: {error}; "
                "set rewards.workers to 0 to run it in this process"
            )
            self.values = dict.fromkeys(range(self._size), Fault(message))
        else:
            self._waiting.extend(_units(self.traits, inputs["prompts"]))

    def contents(self) -> dict[bytes, list[int]]:
        """Content hash -> items that have it, of a pure function; empty for others."""
        found: dict[bytes, list[int]] = {}
        if self.traits.pure:
            for item, row in enumerate(self._rows):
                found.setdefault(hashlib.sha256(row.encode()).digest(), []).append(item)
        return found

    def wait_for(self, items: Sequence[int]) -> None:
        """Judge these items alone; the caller knows what to say of the others."""
        self._waiting = deque([item] for item in items)

    def next_call(self, *, workers: int) -> Call | None:
        """The next call to make; None when no item waits."""
        if self._alone:
            return Call(self, [self._alone.popleft()], self._timeout_seconds)
        if not self._waiting:
            return None
        items = self._waiting.popleft()
        if not self.is_per_item:
            return Call(self, items, self._timeout_seconds * len(items))
        if self._judged:
            share = -(-len(self._waiting) // (4 * workers))
            wanted = min(MOST_ITEMS, share, int(CALL_SECONDS * self._judged / max(self._seconds, 1e-9)))
            items += [self._waiting.popleft()[0] for _ in range(wanted - 1)]
        return Call(self, items, self._timeout_seconds)

    def request(self, call: Call) -> str:
        """The message to a worker that makes the call."""
        rows = ",".join(self._rows[item] for item in call.items)
        return f'{{"function":{self._function},"rows":[{rows}],"state":{self._state}}}'

    def repeat(self, call: Call) -> None:
        """Make the call again as it is; what it was sent to is gone through no fault of its own."""
        if len(call.items) == 1:
            self._alone.appendleft(call.items[0])
        else:
            self._waiting.appendleft(call.items)

    def finish(self, call: Call, answer: Mapping[str, Any]) -> None:
        """Take the answer of a worker."""
        if answer["whole"] and not self.traits.whole_batch:
            self._alone.extend(call.items)
            return
        self._seconds += answer["seconds"]
        self._judged += len(call.items)
        for item, value in zip(call.items, answer["values"], strict=True):
            self.values[item] = Fault(value["fault"]) if isinstance(value, dict) else value
        for column, found in answer["extra"].items():
            whole = self._extra.setdefault(column, [None] * self._size)
            for item, value in zip(call.items, found, strict=True):
                whole[item] = value
        if answer["metrics"]:
            self._logged.append((call.items, answer["metrics"]))

    def fail(self, call: Call, reason: str) -> None:
        """Take note that the call got no answer."""
        if len(call.items) > 1 and not self.traits.whole_batch:
            self._alone.extend(call.items)
            return
        what = "one completion" if len(call.items) == 1 else f"a batch of {len(call.items)} completions"
        fault = Fault(f"reward {self.name!r} {reason} on {what}")
        self.values.update(dict.fromkeys(call.items, fault))

    @property
    def is_per_item(self) -> bool:
        return self.traits.per_item or self.traits.pure

    def judgement(self) -> Judgement:
        """What the reward said of the batch. Logged metrics weigh as much as the items their call judged."""
        metrics: dict[str, list[float]] = {}
        for items, logged in sorted(self._logged, key=lambda each: each[0]):
            for name, values in logged.items():
                metrics.setdefault(name, []).extend(values * len(items))
        return Judgement([self.values[item] for item in range(self._size)], self._extra, metrics)


def _names(reward: Reward, traits: Traits, inputs: Mapping[str, Any]) -> list[str]:
    """Inputs that the function is sent: those it names; with `**kwargs` all, but a pure one depends on the named."""
    named = parameters(reward.function)
    if named is None and traits.pure:
        named = inspect.signature(reward.function).parameters
    return [name for name in inputs if named is None or name in named]


def _units(traits: Traits, prompts: Sequence[object]) -> list[list[int]]:
    """The smallest pieces into which a batch may be cut at first."""
    items = range(len(prompts))
    if traits.whole_batch:
        return [list(items)]
    if traits.per_item or traits.pure:
        return [[item] for item in items]
    units: list[list[int]] = []
    for item in items:
        if item and prompts[item] == prompts[item - 1]:
            units[-1].append(item)
        else:
            units.append([item])
    return units
