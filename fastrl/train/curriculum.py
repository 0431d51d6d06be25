"""Reward weights that change while a run trains: piecewise linear in the optimizer step, configured as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from fastrl.rewards.protocol import Reward

Points = tuple[tuple[int, float], ...]


def points_from(text: str) -> Points:
    """The points of a schedule, as "0: 1, 100: 0.2".

    Raises:
        ValueError: it has no point, or its steps do not increase from 0 on.
    """
    try:
        parts = [part.split(":") for part in text.split(",")]
        points = tuple((int(step), float(factor)) for step, factor in parts)
    except ValueError as error:
        raise ValueError(f"a schedule is `step: factor, step: factor`, as `0: 1, 100: 0.2`, got {text!r}") from error
    steps = [step for step, _ in points]
    if steps[0] < 0 or any(later <= step for step, later in pairwise(steps)):
        raise ValueError(f"the steps of a schedule must increase from 0 on, got {text!r}")
    if not all(abs(factor) < float("inf") for _, factor in points):
        raise ValueError(f"the factors of a schedule must be finite, got {text!r}")
    return points


def factor_at(points: Points, step: int) -> float:
    """The factor at a step: linear between the points, constant before the first and after the last."""
    if step <= points[0][0]:
        return points[0][1]
    for (start, before), (end, after) in pairwise(points):
        if step <= end:
            return before + (after - before) * (step - start) / (end - start)
    return points[-1][1]


def scheduled(rewards: Sequence[Reward], schedule: Mapping[str, str], step: int) -> list[Reward]:
    """The rewards with their weights of this step: the configured weight times the factor.

    Args:
        schedule: reward name -> text for `points_from`.
        step: optimizer steps taken before the round.
    """
    factors = {name: factor_at(points_from(text), step) for name, text in schedule.items()}
    return [replace(reward, weight=reward.weight * factors.get(reward.name, 1.0)) for reward in rewards]


def check_schedule(schedule: Mapping[str, str], names: Sequence[str]) -> None:
    """ValueError for a schedule of a reward that the run does not have.

    Args:
        names: of the run's rewards.
    """
    for name in schedule:
        if name not in names:
            raise ValueError(f"reward_schedule: there is no reward {name!r}; the run has: {', '.join(names)}")


def weight_metrics(rewards: Sequence[Reward], schedule: Mapping[str, str]) -> dict[str, float]:
    """`rewards/<name>/weight` of the rewards that have a schedule."""
    return {f"rewards/{reward.name}/weight": reward.weight for reward in rewards if reward.name in schedule}
