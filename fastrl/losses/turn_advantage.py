"""Credit per turn of an agent: which of an episode's turns earned more than the same turn of its group.

    G[s, k] = sum over j >= k of gamma^(j - k) r[s, j]            r[s, j]: what turn j of episode s earned
    A[s, k] = (G[s, k] - mean) / (deviation + eps)                over the episodes of the group that have a turn k

The caller adds it, weighed, to the episode's own advantage, on the tokens of turn k alone.
Source: episode plus weighed step advantage is GiGPO's (Feng 2025, arXiv:2505.10978, eq. 3 to 8), whose steps are
compared where states are equal; comparing them by their turn is MT-GRPO's (Zeng 2025, arXiv:2505.11821, sec. 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.losses.advantage import group_normalized


def turn_returns(reward: Tensor, *, gamma: float = 1.0) -> Tensor:
    """[S, K] discounted sum of a turn's reward and of those after it; NaN stays NaN and adds nothing.

    Args:
        reward: [S, K] of each turn, in units of reward; NaN where the episode has no such turn.
        gamma: discount per turn, in [0, 1].
    """
    returns = torch.empty_like(reward)
    later = torch.zeros_like(reward[:, 0]) if reward.shape[1] else reward.new_zeros(len(reward))
    for k in reversed(range(reward.shape[1])):
        later = reward[:, k].nan_to_num(0.0) + gamma * later
        returns[:, k] = torch.where(reward[:, k].isnan(), torch.nan, later)
    return returns


def turn_advantage(reward: Tensor, group: Tensor, *, gamma: float = 1.0) -> Tensor:
    """[S, K] normalised return of each turn among the same turns of its group; see the module's docstring.

    Args:
        reward: [S, K] as for `turn_returns`.
        group: [S] int64.
        gamma: discount per turn.

    Returns:
        [S, K] constant; 0 where there is no turn, and for a turn that no other episode of the group has.
    """
    n_turns = reward.shape[1]
    if n_turns == 0:
        return reward
    returns = turn_returns(reward, gamma=gamma)
    cell = group[:, None] * n_turns + torch.arange(n_turns, device=group.device)
    return group_normalized(returns.flatten(), cell.flatten()).view_as(reward)
