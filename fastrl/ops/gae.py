"""Generalised advantage estimation over packed sequences whose tokens are not all the policy's own.

With u(t) the trained token after t, and V past the last trained token 0:

    delta[t] = r[t] + gamma V[u(t)] - V[t],    A[t] = delta[t] + gamma lam A[u(t)],    return[t] = A[t] + V[t]
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_shapes
from fastrl.ops.reverse_scan import check_borders, doubling

IMPLEMENTATIONS = Implementations(op="gae", triton="fastrl.kernels.gae", native="fastrl::gae")


class Gae(NamedTuple):
    """Both 0 where a token is not trained."""

    advantage: Tensor  # [T]
    returns: Tensor  # [T]


@torch.no_grad()
def gae(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    trained: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    skip_observations: bool = True,
    backend: str | None = None,
) -> Gae:
    """Advantage and return of every trained token.

    Tokens that are not trained (prompt, tool output) lie between trained ones. There are two conventions:

    - `skip_observations=True` (verl): they do not exist. u(t) is the next *trained* token of the sequence, however
      far away, and the estimate jumps there with one factor gamma lam.
    - `skip_observations=False` (OpenRLHF, TRL): they are steps with reward 0 and value 0. u(t) = t + 1, so a
      trained token before an observation bootstraps from 0, and each observation token costs a factor gamma lam:
      delta[o] = gamma V[o + 1], A[o] = delta[o] + gamma lam A[o + 1].

    Without observations between trained tokens the two agree. Example with gamma = 1, lam = 0.5, rewards (0, 0, 1),
    values (0.5, 9, 0.25), the middle token observed:

        skip:      A[2] = 1 - 0.25 = 0.75;                                A[0] = (0.25 - 0.5) + 0.5 * 0.75  =  0.125
        otherwise: A[2] = 0.75; A[1] = 0.25 + 0.5 * 0.75 = 0.625 (then 0); A[0] = (0 - 0.5) + 0.5 * 0.625   = -0.1875

    Args:
        reward: [T] reward for `target[t]`, f32 or f64; a constant. The score of a completion sits on its last
            trained token; a reward on an untrained token is not read.
        value: [T] critic at position t, before `target[t]` is drawn; same type; a constant, also in the returns.
        cu_seqlens: [S + 1] int32 or int64, the borders of the sequences, from 0 to T.
        trained: [T] bool, True where the policy chose `target[t]`.
        gamma: discount per step.
        lam: 1 is Monte Carlo minus the critic, 0 the one-step error.
        skip_observations: which convention, see above.
        backend: see `fastrl.ops.backend.choose`.

    Returns:
        `Gae`: advantage and returns [T], of reward's type, without gradient; both 0 where not trained. Nothing
        is whitened: that needs the whole step's tokens, see `fastrl.losses`.

    Raises:
        ValueError: shapes or types that do not fit.

    Cost: torch makes log2(T) passes over [T] and one host sync; native and triton one pass, accumulating in f64.

    Source: Schulman 2016, arXiv:1506.02438, eq. 16; verl `core_algos.compute_gae_advantage_return`;
    OpenRLHF `get_advantages_and_returns`.
    """
    check_shapes("reward[T] value[T] trained[T]", {"reward": reward, "value": value, "trained": trained})
    check_borders(cu_seqlens, reward)
    if reward.dtype not in (torch.float32, torch.float64) or value.dtype != reward.dtype:
        raise ValueError(f"gae needs reward and value both float32 or float64, got {reward.dtype} and {value.dtype}")
    if trained.dtype != torch.bool:
        raise ValueError(f"gae needs trained as bool, got {trained.dtype}; pass weight != 0")
    chosen = choose(backend, reward, IMPLEMENTATIONS)
    if chosen == "native":
        tensors = (reward.contiguous(), value.contiguous(), cu_seqlens.long(), trained.contiguous())
        return Gae(*torch.ops.fastrl.gae(*tensors, gamma, lam, skip_observations))
    if chosen == "triton":
        from fastrl.kernels import gae as kernel

        tensors = (reward.contiguous(), value.contiguous(), cu_seqlens.contiguous(), trained.contiguous())
        return Gae(*kernel.forward(*tensors, gamma, lam, skip_observations))
    function = reference if chosen == "reference" else _scanned
    return function(reward, value, cu_seqlens, trained, gamma, lam, skip_observations)


def reference(
    reward: Tensor, value: Tensor, cu_seqlens: Tensor, trained: Tensor, gamma: float, lam: float, skip: bool
) -> Gae:
    """The recurrence, token by token."""
    advantage, returns = torch.zeros_like(reward), torch.zeros_like(reward)
    borders = cu_seqlens.tolist()
    for start, end in pairwise(borders):
        next_value, next_advantage = reward.new_zeros(()), reward.new_zeros(())
        for t in reversed(range(start, end)):
            if not trained[t]:
                if not skip:  # a step with reward 0 and value 0
                    next_advantage = gamma * next_value + gamma * lam * next_advantage
                    next_value = reward.new_zeros(())
                continue
            delta = reward[t] + gamma * next_value - value[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = value[t]
            advantage[t] = next_advantage
            returns[t] = next_advantage + next_value
    return Gae(advantage, returns)


def _scanned(
    reward: Tensor, value: Tensor, cu_seqlens: Tensor, trained: Tensor, gamma: float, lam: float, skip: bool
) -> Gae:
    """As a reverse scan of delta: over the trained tokens alone, or over all with zeros for the rest."""
    borders = cu_seqlens.long()
    if skip:
        borders = torch.nn.functional.pad(trained.cumsum(0), (1, 0))[borders]
        r, v = reward[trained], value[trained]
    else:
        r, v = torch.where(trained, reward, 0.0), torch.where(trained, value, 0.0)
    following = v.roll(-1)
    if v.numel():
        following[borders[1:] - 1] = 0.0  # -1 (an empty first sequence) is the last token: also an end
    scanned = doubling(r + gamma * following - v, torch.full_like(v, gamma * lam), borders)
    if skip:
        advantage = torch.zeros_like(reward).masked_scatter_(trained, scanned)
    else:
        advantage = torch.where(trained, scanned, 0.0)
    return Gae(advantage, torch.where(trained, advantage + value, 0.0))
