"""Averages of a step's metrics, over its trained tokens or its items, with one host sync."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.types import LossOutput, TokenBatch


@dataclass(frozen=True, slots=True)
class Sums:
    """Totals of one optimizer step, on the device.

    Attributes:
        loss: [] f64, the plain sum: weights are shares of the step already.
        total: name -> [] f64 sum of a metric.
        count: name -> [] f64 tokens or items in it.
    """

    loss: Tensor
    total: dict[str, Tensor]
    count: dict[str, Tensor]


def sums_of(outputs: Iterable[tuple[LossOutput, TokenBatch]]) -> Sums:
    """Add up the losses and metrics of a step's micro-batches: at least one.

    A token metric counts where `weight != 0`, an item metric where it is not NaN.
    """
    loss: Tensor | None = None
    total: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}
    for output, batch in outputs:
        part = output.loss.detach().double()
        loss = part if loss is None else loss + part
        is_trained = batch.weight != 0
        counted = [(name, value, is_trained) for name, value in output.metrics.items()]
        counted += [(name, value, ~value.isnan()) for name, value in output.item_metrics.items()]
        for name, value, is_counted in counted:
            # where, not a product: an untrained position may hold anything.
            part = torch.where(is_counted, value, torch.zeros_like(value)).sum(dtype=torch.float64)
            total[name] = total[name] + part if name in total else part
            n = is_counted.sum(dtype=torch.float64)
            count[name] = count[name] + n if name in count else n
    assert loss is not None, "a step without a micro-batch has nothing to add up"
    return Sums(loss, total, count)


def means_of(sums: Sums, **others: Tensor) -> dict[str, float]:
    """Turn sums into `loss` and means; a metric that nothing counted in is left out. One host sync.

    Args:
        others: [] further numbers to bring to the host with them.
    """
    names = list(sums.total)
    scalars = {"loss": sums.loss} | others
    numbers = [*scalars.values(), *sums.total.values(), *(sums.count[name] for name in names)]
    values = torch.stack([number.double() for number in numbers]).tolist()
    result = dict(zip(scalars, values, strict=False))
    totals, counts = values[len(scalars) : len(scalars) + len(names)], values[len(scalars) + len(names) :]
    return result | {name: a / n for name, a, n in zip(names, totals, counts, strict=True) if n > 0}
