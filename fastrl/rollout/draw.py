"""From logits to a token: the penalty, the filters, the draw, and the log-probability of what was drawn.

    z = filters(penalty(logits) / temperature)          tokens filtered out have z = -inf
    token = min {v : sum_{w <= v} softmax(z)_w > u}     inverse distribution function, u uniform in [0, 1)
    logprob = z[token] - logsumexp(z)

Everything works on rows, so that a row's result does not depend on its neighbours. Rows whose logits hold a NaN
or +inf come back with a logprob that is not finite; the caller must drop them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl.rollout.engine import Sampling


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that already occurred less likely: positive logits are divided, negative ones multiplied.

    Args:
        logits: [B, V] f32.
        seen: [B, V] bool, the tokens in the prompt or completion so far.
        penalty: above 1 discourages repetition, below 1 encourages it.

    Returns:
        [B, V] f32.

    Source: Keskar et al. 2019, arXiv:1909.05858, sec. 4.1, with the sign rule every engine uses.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Divide by the temperature, then keep top-k, top-p and min-p, in this order; filters that are off cost nothing.

    Top-k keeps exactly k tokens. Top-p keeps the smallest set, taken from the most likely token down, whose
    probability reaches it; after top-k, probabilities are those of the k kept. Min-p compares with the most likely
    token, so that it does not matter whether it runs before or after a renormalisation.

    Args:
        logits: [B, V] f32, after the penalty.
        sampling: with a temperature above 0.

    Returns:
        [B, V] f32; -inf where a token was filtered out, never in a whole row.

    Source: top-p, Holtzman et al. 2020, arXiv:1904.09751, sec. 3.1; min-p, Nguyen et al. 2024, arXiv:2407.01082.
    """
    z = logits if sampling.temperature == 1.0 else logits / sampling.temperature
    if 0 < sampling.top_k < z.shape[-1]:
        z = _scattered_back(z, *z.topk(sampling.top_k, dim=-1), sampling.top_p)
    elif sampling.top_p < 1.0:
        # Stable, so that ties at the border fall to the lower token id on every device.
        z = _scattered_back(z, *z.sort(dim=-1, descending=True, stable=True), sampling.top_p)
    if sampling.min_p > 0.0:
        z = z.masked_fill(z < z.amax(dim=-1, keepdim=True) + math.log(sampling.min_p), -math.inf)
    return z


def drawn(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the distribution function.

    Sums of probabilities are kept in float64: at V = 150k, float32 sums would shift the borders between tokens by
    more than the probability of the rare ones.

    Args:
        z: [B, V] f32 logits after the filters.
        u: [B] f64 in [0, 1).

    Returns:
        token [B] int64 and its logprob [B] f32. A token of probability 0 is never drawn.
    """
    lse = z.logsumexp(dim=-1, keepdim=True)  # [B, 1]
    cumulative = (z - lse).exp().cumsum(dim=-1, dtype=torch.float64)
    # u < 1, and so u * total < total in float64: a row of finite logits always finds its token. A NaN row may not.
    token = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).clamp_(max=z.shape[-1] - 1)
    return token[:, 0], (z.gather(-1, token) - lse)[:, 0]


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, with its log-probability at temperature 1.

    The filters are not applied: the best token is inside all of them, and nothing is drawn.

    Args:
        logits: [B, V] f32, after the penalty.

    Returns:
        token [B] int64 and its logprob [B] f32.
    """
    best, token = logits.max(dim=-1)
    return token, best - logits.logsumexp(dim=-1)


def _scattered_back(z: Tensor, value: Tensor, index: Tensor, top_p: float) -> Tensor:
    """Put the sorted logits back in vocabulary order, without those past the top-p border."""
    if top_p < 1.0:
        probability = value.softmax(dim=-1, dtype=torch.float64)
        before = probability.cumsum(dim=-1) - probability
        before[:, 0] = 0.0  # the first token stays, whatever rounding does
        value = value.masked_fill(before >= top_p, -math.inf)
    return torch.full_like(z, -math.inf).scatter_(-1, index, value)
