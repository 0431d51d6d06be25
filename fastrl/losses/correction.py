"""Constant weights that correct for a sampler whose distribution is not the trainer's.

Every function maps `(log_weight [T], sequence [T], trained [T]) -> [T]`, where log_weight = l_old - l_mu is what
separates the two at the moment of sampling. The weight multiplies the surrogate after its clip, never the KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.losses.ratio import sequence_total


def truncate(
    log_weight: Tensor, sequence: Tensor | None = None, trained: Tensor | None = None, *, high: float = 2.0
) -> Tensor:
    """Truncated importance sampling: min(w, high), w = exp(log_weight).

    Args:
        log_weight: [T] l_old - l_mu, nats; read as a constant.
        sequence, trained: accepted for the shared signature; a token's own weight does not read them.
        high: largest weight.

    Returns:
        [T] constant.

    Source: Yao 2025, "Your efficient RL framework secretly brings you off-policy RL training"; Ionides 2008.
    """
    return log_weight.detach().exp().clamp(max=high)


def mask(
    log_weight: Tensor,
    sequence: Tensor | None = None,
    trained: Tensor | None = None,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> Tensor:
    """IcePop: the weight where it lies in [low, high], 0 outside.

    Args and returns as `truncate`.

    Source: Ling team 2025, arXiv:2510.18855 (IcePop).
    """
    weight = log_weight.detach().exp()
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def sequence_mask(log_weight: Tensor, sequence: Tensor, trained: Tensor, *, high: float = 3.0) -> Tensor:
    """The sequence's full weight at each of its tokens, 0 for the whole sequence where it exceeds high.

        W = exp(sum of log_weight over the sequence's trained tokens),    out = W if W <= high else 0

    Args:
        log_weight: [T] l_old - l_mu, nats; read as a constant.
        sequence: [T] int64, the sequence of each token, numbered from 0 and below T.
        trained: [T] bool, the tokens that count.
        high: largest weight kept.

    Returns:
        [T] constant; summed in f64.

    Source: TRL `vllm_importance_sampling_mode="sequence_mask"`, its default, with cap 3.0.
    """
    weight = sequence_total(log_weight.detach(), sequence, trained).exp().to(log_weight.dtype)
    return torch.where(weight <= high, weight, 0.0)


TOKENWISE = frozenset({truncate, mask})  # corrections that need no other token; anything else couples a sequence
