"""What the critic minimises: the squared distance of its value to the return, near its value at sampling time.

A value belongs to the state in which `target[t]` is chosen: V of the tokens up to and including `input_ids[t]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def value_squared(value: Tensor, returns: Tensor) -> Tensor:
    """The critic's loss without a clip.

        loss[t] = (V - R)^2 / 2

    Gradient: V - R.

    Args:
        value: [T] the critic now, in units of reward; differentiable.
        returns: [T] what it should have said (`ops.gae`); a constant.

    Returns:
        [T] loss per token, unweighted.

    Source: Schulman 2017, arXiv:1707.06347, eq. 9 (with the half that TRL and verl put before it).
    """
    return (value - returns).square() / 2


def value_clipped(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """The critic's loss with a pessimistic clip, which holds a value near the one that the advantages came from.

        loss[t] = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

    Gradient: V - R where the clip does not bind or the first term is the larger; 0 where it binds and its is.

    Args:
        value: [T] the critic now, in units of reward; differentiable.
        old_value: [T] the critic when the round was sampled; a constant.
        returns: [T] what it should have said (`ops.gae`); a constant.
        clip: c, in units of reward: how far a value may move in one round before it stops being pulled.

    Returns:
        [T] loss per token, unweighted.

    Source: Baselines `ppo2`; Huang 2024, arXiv:2403.17031; TRL, OpenRLHF and verl.
    """
    held = torch.clamp(value, old_value - clip, old_value + clip)
    return torch.maximum(value_squared(value, returns), value_squared(held, returns))


def value_is_clipped(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """[T] bool: the clip of `value_clipped` binds and its term is the larger, so that the token pulls no more."""
    held = torch.clamp(value, old_value - clip, old_value + clip)
    return value_squared(held, returns) > value_squared(value, returns)
