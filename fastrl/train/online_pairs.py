"""Pairs out of judged rollouts: the best completion of each prompt against the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastrl.train.preference_rows import Pair
from fastrl.train.supervised import Example
from fastrl.types import Rollout


@dataclass(frozen=True, slots=True)
class Paired:
    """The pairs of one round.

    Attributes:
        pairs: one for each prompt whose best and worst completions differ in reward.
        margins: difference of their rewards.
        n_tied: prompts whose judged completions have all the same reward.
        n_unjudged: prompts with fewer than two verdicts.
    """

    pairs: list[Pair]
    margins: list[float]
    n_tied: int
    n_unjudged: int


def best_and_worst(rollouts: Sequence[Rollout], reward: Tensor, group: Tensor) -> Paired:
    """Pair the first best with the first worst completion of each prompt.

    Args:
        rollouts: [S] judged completions.
        reward: [S]; NaN is no verdict.
        group: [S] int64, the prompt of each.
    """
    members: dict[int, list[tuple[float, Rollout]]] = {}
    for rollout, value, number in zip(rollouts, reward.tolist(), group.tolist(), strict=True):
        judged = members.setdefault(number, [])
        if value == value:  # not NaN
            judged.append((value, rollout))
    pairs, margins, n_tied, n_unjudged = [], [], 0, 0
    for judged in members.values():
        best = max(judged, key=lambda each: each[0], default=(0.0, None))
        worst = min(judged, key=lambda each: each[0], default=(0.0, None))
        if len(judged) < 2:
            n_unjudged += 1
        elif best[0] == worst[0]:
            n_tied += 1
        elif best[1] is not None and worst[1] is not None:
            pairs.append(Pair(_example(best[1]), _example(worst[1])))
            margins.append(best[0] - worst[0])
    return Paired(pairs, margins, n_tied, n_unjudged)


def _example(rollout: Rollout) -> Example:
    is_sampled = rollout.is_sampled or (True,) * len(rollout.completion_ids)
    return Example(rollout.prompt_ids + rollout.completion_ids, (False,) * len(rollout.prompt_ids) + is_sampled)
