"""An adapter from verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` to TRL's signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.rewards.protocol import function_name, is_async, promises
from fastrl.rewards.text import completion_text


def verl_reward(compute_score: Callable[..., Any]) -> Callable[..., list[Any]]:
    """A reward function that calls verl's `compute_score` once per completion, by keyword as verl does.

    It reads verl's columns: `data_source`, `reward_model` (a mapping with `ground_truth`; or a flat column
    `ground_truth`), `extra_info`. A mapping returned must hold "score"; its other entries go to `log_extra`.
    An exception counts against the item it came from, not against the batch.

    Raises:
        ValueError: compute_score is async.
    """
    if is_async(compute_score):
        raise ValueError(
            f"{function_name(compute_score)} is async; write it with TRL's signature, which may be async, instead"
        )
    return VerlReward(compute_score)


@promises(per_item=True)
@dataclass(frozen=True)
class VerlReward:
    """verl's `compute_score` behind TRL's signature; made by `verl_reward`."""

    # A record rather than a closure, so that it can travel to another process.
    compute_score: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return function_name(self.compute_score)

    def __call__(
        self,
        completions: Sequence[object],
        data_source: Sequence[object] | None = None,
        reward_model: Sequence[Mapping[str, object]] | None = None,
        ground_truth: Sequence[object] | None = None,
        extra_info: Sequence[object] | None = None,
        log_extra: Callable[[str, list[object]], None] | None = None,
    ) -> list[Any]:
        """[S] completions and verl's columns -> [S] scores or exceptions."""
        if ground_truth is None and reward_model is None:
            raise ValueError("a verl reward needs the column reward_model (with ground_truth in it) or ground_truth")
        unknown: list[object] = [None] * len(completions)
        truths = ground_truth or [row["ground_truth"] for row in reward_model or ()]
        results = [
            self._score(
                data_source=source, solution_str=completion_text(completion), ground_truth=truth, extra_info=info
            )
            for source, completion, truth, info in zip(
                data_source or unknown, completions, truths, extra_info or [{}] * len(completions), strict=True
            )
        ]
        details = [result if isinstance(result, Mapping) else {} for result in results]
        if log_extra is not None:
            for name in {name: None for detail in details for name in detail if name != "score"}:
                log_extra(name, [detail.get(name) for detail in details])
        return [result["score"] if isinstance(result, Mapping) else result for result in results]

    def _score(self, **arguments: object) -> Any:
        try:
            result = self.compute_score(**arguments)
        except Exception as error:
            return error
        if isinstance(result, Mapping) and "score" not in result:
            return ValueError(f"{function_name(self.compute_score)} returned a mapping without 'score': {list(result)}")
        return result
