"""TRL's functions of logits, with TRL's arguments and returns, over `fastrl.ops.logits_logprob`.

Everything is worked out in float32 (float64 for float64 logits). As with TRL, 16-bit logits get float32 results on a
GPU, and results rounded to the logits' dtype elsewhere. A negative index is ignored, with log-probability 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ops import TokenStats, logits_logprob


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probability of chosen classes.

    Args:
        logits: [..., V]; differentiable.
        index: [...] one class per row, or [..., K] several.
        temperature: divides the logits.
        row_mask: [...] rows of 0 give 0 and no gradient.

    Returns:
        like index, in nats.

    Raises:
        ValueError: a temperature that is not positive, shapes that do not fit.
    """
    if index.dim() == logits.dim():
        lse = _stats(logits, logits.new_zeros(logits.shape[:-1], dtype=torch.int64), temperature).lse
        chosen = logits.gather(-1, index.clamp(min=0)).to(lse.dtype) / temperature
        logprob = (chosen - lse[..., None]).masked_fill(index < 0, 0.0)
    else:
        logprob = _stats(logits, index, temperature).logprob
    return _returned(logprob, logits, row_mask)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability [...] of one class per row and the entropy [...] of the row, in nats; see above."""
    stats = _stats(logits, index, temperature)
    entropy = stats.entropy if entropy_requires_grad else stats.entropy.detach()
    return _returned(stats.logprob, logits, row_mask), _returned(entropy, logits, row_mask)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy [...] of each row of logits [..., V], in nats.

    Args:
        chunk_size: TRL's rows at a time; a bound on memory that fastrl keeps by its own chunks of at most as many.
    """
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _returned(_stats(logits, index, 1.0, chunk_rows=chunk_size).entropy, logits, None)


def _stats(logits: Tensor, index: Tensor, temperature: float, *, chunk_rows: int | None = None) -> TokenStats:
    if temperature <= 0:
        raise ValueError("temperature must be positive")
    rows = logits.reshape(-1, logits.shape[-1])
    target = index.reshape(-1).to(torch.int64)
    found = logits_logprob(rows, target, temperature=temperature, chunk_rows=chunk_rows)
    return TokenStats(*(value.view(index.shape) for value in found))


def _returned(values: Tensor, logits: Tensor, row_mask: Tensor | None) -> Tensor:
    """In the dtype that TRL returns, with 0 in masked rows."""
    is_wide = logits.device.type in ("cuda", "xpu")
    values = values if is_wide else values.to(logits.dtype)
    return values if row_mask is None else values.masked_fill(row_mask == 0, 0.0)
