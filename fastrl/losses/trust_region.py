"""Which tokens may still be pushed: a mask from the divergence of the taken token's probability, not from its ratio.

Every function maps `(logprob [T], old_logprob [T], advantage [T]) -> [T]` of 0 or 1, constant. DPPO multiplies it
into `cispo`'s loss. A rare token may change its ratio a lot, a likely one may not move its probability much.
"""

from __future__ import annotations

import torch
from torch import Tensor


def binary_tv(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """0 where the token's probability has moved too far in the direction its advantage pushes.

        mask = p - p_old <= high  where A > 0,    p - p_old >= -low  elsewhere

    |p - p_old| is the total variation between the two policies once all other tokens are merged into one.

    Args:
        logprob: [T] under the policy being trained, nats; read as a constant.
        old_logprob: [T] under the policy that defines the region, nats. The paper's is the sampler.
        advantage: [T] only its sign is read.
        low, high: how far the probability may fall and rise. The runs in verl's documentation use 0.15.

    Returns:
        [T] 0 or 1 in the type of logprob, constant.

    Source: Qi 2026, arXiv:2602.04879 (DPPO-Binary-TV); the authors' code, github.com/sail-sg/Stable-RL.
    """
    moved = logprob.detach().exp() - old_logprob.exp()
    return torch.where(advantage > 0, moved <= high, moved >= -low).to(logprob.dtype)


def binary_kl(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, *, low: float = 0.05, high: float = 0.05
) -> Tensor:
    """`binary_tv` with the KL divergence of the two-outcome distributions (the token, everything else).

        kl = p_old log(p_old / p) + (1 - p_old) log((1 - p_old + e) / (1 - p + e)),    e = 1e-8
        mask = not (kl > high and p > p_old)  where A > 0,    not (kl > low and p < p_old)  elsewhere

    Args and returns as `binary_tv`; low and high are in nats and have no published default that was verified.

    Source: Qi 2026, arXiv:2602.04879 (DPPO-Binary-KL); the authors' code, github.com/sail-sg/Stable-RL.
    """
    tiny = 1e-8
    now = logprob.detach()
    p, p_old = now.exp(), old_logprob.exp()
    divergence = p_old * (old_logprob - now) + (1 - p_old) * ((1 - p_old + tiny) / (1 - p + tiny)).log()
    too_high = (divergence > high) & (p > p_old)
    too_low = (divergence > low) & (p < p_old)
    return (~torch.where(advantage > 0, too_high, too_low)).to(logprob.dtype)
