"""DAPO's dynamic sampling as pure bookkeeping: which groups can teach something, and when to stop looking for more.

Source: Yu 2025, arXiv:2503.14476, sec. 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def groups_with_signal(reward: Tensor, group: Tensor) -> Tensor:
    """The rollouts whose group has two different rewards.

    Args:
        reward: [S]; NaN, a rollout that could not be judged, is not a reward.
        group: [S] int64.

    Returns:
        [S] bool, the same for every member of a group.
    """
    segment = group.unique(return_inverse=True)[1]
    judged = reward.isfinite()
    empty = reward.new_full(reward.shape, -torch.inf)
    highest = empty.scatter_reduce(0, segment, torch.where(judged, reward, -torch.inf), "amax")
    lowest = -empty.scatter_reduce(0, segment, torch.where(judged, -reward, -torch.inf), "amax")
    return (highest > lowest)[segment]


@dataclass(frozen=True, slots=True)
class Rounds:
    """How far a step has come in filling its batch.

    Attributes:
        wanted: groups with signal the step asks for.
        max_rounds: extra rounds allowed after the first; 0 takes what the first gives.
        kept: groups with signal found, at most `wanted` of which are used.
        drawn: groups sampled.
        rounds: rounds done.
    """

    wanted: int
    max_rounds: int
    kept: int = 0
    drawn: int = 0
    rounds: int = 0


def after_round(state: Rounds, *, drawn: int, with_signal: int) -> Rounds:
    """The bookkeeping once a round sampled `drawn` groups, `with_signal` of which have a signal."""
    if not 0 <= with_signal <= drawn:
        raise ValueError(f"a round of {drawn} groups cannot have {with_signal} with a signal")
    return replace(state, kept=state.kept + with_signal, drawn=state.drawn + drawn, rounds=state.rounds + 1)


def missing(state: Rounds) -> int:
    """Groups the next round should bring; 0 when the batch is full or the rounds are used up."""
    if state.rounds > state.max_rounds:
        return 0
    return max(state.wanted - state.kept, 0)


def waste(state: Rounds) -> float:
    """Share of the sampled groups that are not trained on: those without signal and those beyond the wanted number."""
    if state.drawn == 0:
        return 0.0
    return 1 - min(state.kept, state.wanted) / state.drawn
