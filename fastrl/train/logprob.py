"""The waist under losses that couple tokens: log-probabilities with a gradient, and their sums over sequences.

With the budgeted cache of `linear_logprob` a step costs 6 N D V operations, as a single pass does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.ops.linear_logprob import linear_logprob
from fastrl.train.config import KernelsBlock
from fastrl.train.model import hidden_states
from fastrl.types import Head, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trained_logprob(
    model: PreTrainedModel, head: Head, batch: TokenBatch, kernels: KernelsBlock
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the positions with a weight, 0 elsewhere; the others never reach the head.

    Returns:
        [T] log-probability and [T] entropy, f32, nats; both differentiable.
    """
    rows = batch.weight.nonzero()[:, 0]
    stats = linear_logprob(
        hidden_states(model, batch)[rows],
        head.weight,
        batch.target[rows],
        bias=head.bias,
        temperature=head.temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        chunk_rows=kernels.chunk_rows,
        backend=kernels.backend,
    )
    nothing = torch.zeros_like(batch.weight)
    return nothing.index_copy(0, rows, stats.logprob.float()), nothing.index_copy(0, rows, stats.entropy.float())


def sequence_sum(per_token: Tensor, batch: TokenBatch) -> Tensor:
    """Add up a value over the positions of each packed sequence, in the order of `batch.sequence`.

    Args:
        per_token: [T]; differentiable. Multiplied by `batch.weight` before, it is a weighted sum: weights of 1 give
            the log-probability of a completion, weights of 1 / n its mean over n tokens.

    Returns:
        [S] in the dtype of `per_token`, summed in f64.
    """
    lengths = batch.cu_seqlens.diff().long()
    member = torch.repeat_interleave(
        torch.arange(len(lengths), device=per_token.device), lengths, output_size=len(per_token)
    )
    total = torch.zeros(len(lengths), dtype=torch.float64, device=per_token.device)
    return total.index_add(0, member, per_token.double()).to(per_token.dtype)
