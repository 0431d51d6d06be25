"""What the episodes of a round add to it: credit per turn, metrics under TRL's names, and failures of environments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastrl.losses.turn_advantage import turn_advantage
from fastrl.rewards.score import RewardError
from fastrl.rollout.episodes import Episode
from fastrl.train.config import EnvironmentBlock


def token_credit(
    episodes: Sequence[Episode], group: Tensor, is_judged: Tensor, block: EnvironmentBlock
) -> list[list[float]] | None:
    """[S][completion tokens] what each token's advantage gains by its turn; None when turns are not credited.

    Args:
        group: [S] int64.
        is_judged: [S] bool; an episode without a verdict is part of no mean.
        block: `turn_advantage_weight` and `turn_gamma` are read.
    """
    if block.turn_advantage_weight == 0 or not episodes:
        return None
    most = max(len(episode.turn_rewards) for episode in episodes)
    reward = torch.full((len(episodes), most), torch.nan)
    for row, episode, counts in zip(reward, episodes, is_judged.tolist(), strict=True):
        if counts:
            row[: len(episode.turn_rewards)] = torch.tensor(
                [torch.nan if value is None else value for value in episode.turn_rewards]
            )
    advantage = block.turn_advantage_weight * turn_advantage(reward, group, gamma=block.turn_gamma)
    credit = []
    for episode, values in zip(episodes, advantage.tolist(), strict=True):
        ends = [0, *episode.turn_ends]
        # The observation before a turn is not sampled, and weighs 0 whatever stands there.
        credit.append([values[k] for k, n in enumerate(_lengths(ends)) for _ in range(n)])
        credit[-1] += [0.0] * (len(episode.rollout.completion_ids) - ends[-1])
    return credit


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Describe the episodes of a round; {} when there are none.

    `tools/call_frequency` is calls per episode and `tools/failure_frequency` the share of calls that failed, as TRL
    logs them. `episodes/<limit>_limit` is the share that this limit ended.
    """
    if not episodes:
        return {}
    n, calls = len(episodes), sum(episode.n_calls for episode in episodes)
    metrics = {
        "tools/call_frequency": calls / n,
        "tools/failure_frequency": sum(episode.n_failures for episode in episodes) / calls if calls else 0.0,
        "episodes/turns": sum(len(episode.turn_ends) for episode in episodes) / n,
        "episodes/seconds": sum(episode.seconds for episode in episodes) / n,
        "episodes/environment_error_rate": sum(bool(episode.error) for episode in episodes) / n,
    }
    for limit in ("turns", "tokens", "seconds"):
        metrics[f"episodes/{limit}_limit"] = sum(episode.limit == limit for episode in episodes) / n
    earned = [value for episode in episodes for value in episode.turn_rewards if value is not None]
    return metrics | ({"episodes/turn_reward": sum(earned) / len(earned)} if earned else {})


def environment_errors(episodes: Sequence[Episode]) -> dict[str, RewardError]:
    """The episodes that an environment ended, counted as failures of rewards are, under the name "environment"."""
    errors = [episode.error for episode in episodes if episode.error]
    return {"environment": RewardError(len(errors), errors[0])} if errors else {}


def _lengths(ends: Sequence[int]) -> list[int]:
    return [last - first for first, last in pairwise(ends)]
