"""Which ratio a token's surrogate sees: its own, or one its whole sequence shares.

Every function maps `(log_ratio [T], sequence [T], trained [T]) -> [T]`. A shared ratio has the sequence's value and
the gradient of the token's own log-probability (GSPO-token), so a chunk of rows can be differentiated on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_ratio(log_ratio: Tensor, sequence: Tensor, trained: Tensor, *, limit: float | None = None) -> Tensor:
    """The token's own log-ratio.

    Args:
        log_ratio: [T] nats; differentiable.
        sequence: [T] accepted for the shared signature; a token's own ratio does not read it.
        trained: [T] likewise.
        limit: holds the log-ratio in +-limit, with gradient 0 outside; None leaves it alone (verl, OpenRLHF: 20).

    Returns:
        [T] log-ratio.
    """
    return log_ratio if limit is None else log_ratio.clamp(-limit, limit)


def sequence_ratio(log_ratio: Tensor, sequence: Tensor, trained: Tensor) -> Tensor:
    """GSPO's length-normalised ratio of the sequence, in its token form.

        s = mean of log_ratio over the sequence's trained tokens
        out[t] = stop(s) + log_ratio[t] - stop(log_ratio[t])

    Args:
        log_ratio: [T] nats; differentiable.
        sequence: [T] int64, the sequence of each token, numbered from 0 and below T.
        trained: [T] bool, the tokens that count.

    Returns:
        [T] log-ratio with the sequence's value; summed in f64.

    Source: Zheng 2025, arXiv:2507.18071, eq. 7 (ratio) and sec. 4.3 (token form).
    """
    count = sequence_total(torch.ones_like(log_ratio), sequence, trained).clamp(min=1)
    mean = sequence_total(log_ratio.detach(), sequence, trained) / count
    return mean.to(log_ratio.dtype) + (log_ratio - log_ratio.detach())


def sequence_product(log_ratio: Tensor, sequence: Tensor, trained: Tensor) -> Tensor:
    """The sequence's full importance ratio, without length normalisation, in the same token form.

        s = sum of log_ratio over the sequence's trained tokens
        out[t] = stop(s) + log_ratio[t] - stop(log_ratio[t])

    Args and returns as `sequence_ratio`. VESPO's W.

    Source: Shen 2026, arXiv:2602.10693, sec. 3.4.
    """
    total = sequence_total(log_ratio.detach(), sequence, trained)
    return total.to(log_ratio.dtype) + (log_ratio - log_ratio.detach())


def sequence_total(x: Tensor, sequence: Tensor, trained: Tensor) -> Tensor:
    """[T] f64: at every token, the sum of x over the trained tokens of its sequence.

    f64 keeps the sum the same, to f32's last digit, however the tokens are packed. No host sync: the scratch
    space has T places because the number of sequences is not known on the host.
    """
    kept = torch.where(trained, x, 0.0).double()
    return torch.zeros_like(kept).index_add(0, sequence, kept)[sequence]


TOKENWISE = frozenset({token_ratio})  # ratios that need no other token; anything else couples a sequence
