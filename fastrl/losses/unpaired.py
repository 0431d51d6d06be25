"""KTO: single completions judged desirable or not, against a baseline that says how far the policy has moved."""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    log_ratio: Tensor,
    is_desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Prospect-theoretic loss of one completion: gains and losses against the baseline, each saturating.

        loss = desirable_weight sigmoid(-beta (r - z))      where desirable
               undesirable_weight sigmoid(beta (r - z))     elsewhere;    r = log_ratio, z = baseline

    Args:
        log_ratio: [S] log pi(y|x) - log pi_ref(y|x), nats; differentiable.
        is_desirable: [S] bool.
        baseline: [] from `kl_baseline`, a constant; 0 gives TRL's `apo_zero_unpaired`.
        beta: how strongly the policy is held to the reference.
        desirable_weight, undesirable_weight: to balance unequal counts; the paper wants
            desirable_weight n_desirable / (undesirable_weight n_undesirable) in [1, 4/3].

    Returns:
        [S] loss per completion.

    Source: Ethayarajh 2024, arXiv:2402.01306, eq. 7 and 8.
    """
    x = beta * (log_ratio - baseline.detach())
    gain = desirable_weight * torch.sigmoid(-x)
    return torch.where(is_desirable, gain, undesirable_weight * torch.sigmoid(x))


def kl_baseline(log_ratio: Tensor) -> Tensor:
    """max(0, mean of log-ratios of mismatched pairs): KTO's shared estimate of KL(pi || pi_ref).

    Args:
        log_ratio: [S] log pi(y'|x) - log pi_ref(y'|x), y' the completion of another prompt, nats; a constant.

    Returns:
        [] nats, without gradient; 0 when there is no pair.

    Source: Ethayarajh 2024, arXiv:2402.01306.
    """
    return (log_ratio.detach().double().sum() / max(1, len(log_ratio))).clamp(min=0).to(log_ratio.dtype)
