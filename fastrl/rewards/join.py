"""One batch judged in parts, by several processes: the scores that one process would have given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastrl.rewards.correlation import correlation_metrics
from fastrl.rewards.protocol import Reward
from fastrl.rewards.score import RewardError, Scores, mean_and_std, weighted_total

Value = TypeVar("Value")


def joined_scores(
    rewards: Sequence[Reward],
    parts: Sequence[Scores],
    places: Sequence[Sequence[int]],
    *,
    lengths: Sequence[int],
    is_whole: Sequence[bool],
) -> Scores:
    """Put the scores of parts of a batch in order and describe the whole.

    Args:
        rewards: that judged every part.
        parts: of the batch, each with one entry per item; a total may hold more than the rewards (a punishment).
        places: of the items of each part in the batch.
        lengths: [S] tokens of each completion.
        is_whole: [S] False of items that were shown to no reward.

    Returns:
        Scores of S items. Statistics are computed again over all of them; a metric that a reward function logged itself
        is the mean of the parts' values, each counting as often as the part has items.
    """
    n = len(lengths)
    values = tuple(_spread([part.values[r] for part in parts], places, n) for r in range(len(rewards)))
    counted = tuple(_spread([part.counted[r] for part in parts], places, n) for r in range(len(rewards)))
    total = _spread([part.total for part in parts], places, n)
    extras = dict.fromkeys(name for part in parts for name in part.extra)
    errors: dict[str, RewardError] = {}
    for name, error in (item for part in parts for item in part.errors.items()):
        earlier = errors.get(name)
        errors[name] = error if earlier is None else RewardError(earlier.count + error.count, earlier.first)
    return Scores(
        values=values,
        total=total,
        errors=errors,
        metrics=_logged_means(parts) | _statistics(rewards, values, counted, total, errors, lengths, is_whole),
        extra={
            name: _spread([part.extra.get(name, [None] * len(part.total)) for part in parts], places, n)
            for name in extras
        },
        counted=counted,
    )


def _statistics(
    rewards: Sequence[Reward],
    values: Sequence[Sequence[float | None]],
    counted: Sequence[Sequence[float | None]],
    total: Sequence[float | None],
    errors: dict[str, RewardError],
    lengths: Sequence[int],
    is_whole: Sequence[bool],
) -> dict[str, float]:
    """What `score` says of a batch, from the values of its items."""
    metrics: dict[str, float] = {}
    n_whole = sum(is_whole)
    for reward, column in zip(rewards, values, strict=True):
        metrics |= mean_and_std(column, f"rewards/{reward.name}/mean", f"rewards/{reward.name}/std")
        if n_whole:
            failed = errors[reward.name].count if reward.name in errors else 0
            metrics[f"rewards/{reward.name}/error_rate"] = failed / n_whole
    of_rewards = [
        None if each is None else weighted_total(rewards, [column[s] for column in counted])
        for s, each in enumerate(total)
    ]
    columns = {reward.name: column for reward, column in zip(rewards, values, strict=True)}
    metrics |= mean_and_std(of_rewards, "reward", "reward_std")
    return metrics | correlation_metrics(columns, of_rewards, lengths)


def _logged_means(parts: Sequence[Scores]) -> dict[str, float]:
    """Means over the parts; `_statistics` writes its own over them."""
    names = dict.fromkeys(name for part in parts for name in part.metrics if "/correlation/" not in name)
    found = {}
    for name in names:
        having = [part for part in parts if name in part.metrics]
        n_items = sum(len(part.total) for part in having)
        found[name] = sum(part.metrics[name] * len(part.total) for part in having) / n_items
    return found


def _spread(parts: Sequence[Sequence[Value]], places: Sequence[Sequence[int]], n: int) -> tuple[Value, ...]:
    """Entries of several parts at their places among n."""
    pairs = (zip(its, part, strict=True) for part, its in zip(parts, places, strict=True))
    found = {place: value for each in pairs for place, value in each}
    return tuple(found[place] for place in range(n))
