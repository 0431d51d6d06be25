"""A batch judged in parts has the scores and the statistics of the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastrl.rewards.gates import gates_from
from fastrl.rewards.join import joined_scores
from fastrl.rewards.protocol import Reward
from fastrl.rewards.score import score

IDS = [[1], [2, 3], [4, 5, 6], [7], [8, 9], [1, 2, 3, 4], [5]]
PLACES = [[0, 3, 5], [1, 6], [2, 4], []]


def total(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    values = [float(sum(ids)) for ids in completion_ids]
    log_metric("mean_total", sum(values) / len(values))
    log_extra("digits", [str(value) for value in values])
    return values


def short(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    """None for three tokens, a failure for four."""
    return [None if len(ids) == 3 else ValueError("long") if len(ids) == 4 else -len(ids) for ids in completion_ids]


REWARDS = [Reward(total, weight=0.5, name="total"), Reward(short, weight=2.0, name="short")]


def scored(places: list[int]) -> Any:
    ids = [IDS[place] for place in places]
    return score(REWARDS, [""] * len(ids), [""] * len(ids), ids, {}, gates=gates_from({"short": "total > 5"}))


def test_parts_make_the_whole() -> None:
    lengths = [len(ids) for ids in IDS]
    found = joined_scores(
        REWARDS, [scored(part) for part in PLACES], PLACES, lengths=lengths, is_whole=[True] * len(IDS)
    )
    whole = scored(list(range(len(IDS))))
    assert (found.values, found.total, found.counted) == (whole.values, whole.total, whole.counted)
    assert found.metrics == pytest.approx(whole.metrics)
    assert found.metrics.keys() == whole.metrics.keys()
    assert {name: list(column) for name, column in found.extra.items()} == whole.extra
    assert found.errors["short"].count == whole.errors["short"].count == 1


def test_a_punishment_in_the_totals_is_not_in_the_rewards_statistics() -> None:
    parts = [scored(part) for part in PLACES]
    punished = [replace(part, total=tuple(None if x is None else x - 100 for x in part.total)) for part in parts]
    found = joined_scores(REWARDS, punished, PLACES, lengths=[1] * len(IDS), is_whole=[True] * len(IDS))
    assert found.metrics["reward"] == pytest.approx(scored(list(range(len(IDS)))).metrics["reward"])
    assert found.total[0] == pytest.approx(scored([0]).total[0] - 100)
