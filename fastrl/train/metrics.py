"""Averages of per-token metrics over the trained tokens of a step, with one host sync."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastrl.types import LossOutput, TokenBatch


def token_sums(outputs: Iterable[tuple[LossOutput, TokenBatch]]) -> dict[str, Tensor]:
    """Add up loss, trained tokens and every per-token metric over micro-batches, on the device.

    Returns:
        name -> [] f64 sum over trained tokens (weight != 0); "loss" is the plain sum, "tokens" the count.
    """
    sums: dict[str, Tensor] = {}
    for output, batch in outputs:
        is_trained = batch.weight != 0
        parts = {"loss": output.loss.detach().double(), "tokens": is_trained.sum().double()}
        for name, value in output.metrics.items():
            # where, not a product: an untrained position may hold anything.
            parts[name] = torch.where(is_trained, value, torch.zeros_like(value)).sum(dtype=torch.float64)
        for name, part in parts.items():
            sums[name] = sums[name] + part if name in sums else part
    return sums


def token_means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Turn sums into means per trained token; `loss` stays a sum and `tokens` a count. One host sync."""
    if not sums:
        return {"loss": 0.0, "tokens": 0.0}
    names = list(sums)
    values = dict(zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True))
    tokens = max(values["tokens"], 1.0)
    return {name: value if name in ("loss", "tokens") else value / tokens for name, value in values.items()}
