"""Averages of a step's metrics, over its trained tokens or its items, with one host sync."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.train.distributed import gather, size
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
    """Add up the losses and metrics of a step's micro-batches; a rank without any adds nothing.

    A token metric counts where `weight != 0`, an item metric where it is not NaN.
    """
    loss = torch.zeros((), dtype=torch.float64)
    total: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}
    for output, batch in outputs:
        loss = loss.to(output.loss.device) + output.loss.detach().double()
        is_trained = batch.weight != 0
        counted = [(name, value, is_trained) for name, value in output.metrics.items()]
        counted += [(name, value, ~value.isnan()) for name, value in output.item_metrics.items()]
        for name, value, is_counted in counted:
            # where, not a product: an untrained position may hold anything.
            part = torch.where(is_counted, value, torch.zeros_like(value)).sum(dtype=torch.float64)
            total[name] = total[name] + part if name in total else part
            n = is_counted.sum(dtype=torch.float64)
            count[name] = count[name] + n if name in count else n
    return Sums(loss, total, count)


def sums_of_all_ranks(sums: Sums) -> Sums:
    """Add up the sums of all ranks, in their order: the same numbers on each, on the CPU."""
    if size() == 1:
        return sums
    told = [sums.loss.item(), _numbers(sums.total), _numbers(sums.count)]
    everybody = gather(told, "the losses and metrics of the step")
    loss = sum(of_rank[0] for of_rank in everybody)
    total, count = (_added([of_rank[part] for of_rank in everybody]) for part in (1, 2))
    return Sums(torch.tensor(loss, dtype=torch.float64), total, count)


def _numbers(named: Mapping[str, Tensor]) -> dict[str, float]:
    values = torch.stack(list(named.values())).tolist() if named else []
    return dict(zip(named, values, strict=True))


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.tensor(sum(part.get(name, 0.0) for part in parts), dtype=torch.float64) for name in names}


def means_of(sums: Sums, **others: Tensor) -> dict[str, float]:
    """Turn sums into `loss` and means; a metric that nothing counted in is left out. One host sync.

    Args:
        others: [] further numbers to bring to the host with them.
    """
    names = list(sums.total)
    scalars = {"loss": sums.loss} | others
    numbers = [*scalars.values(), *sums.total.values(), *(sums.count[name] for name in names)]
    device = next(iter(others.values()), sums.loss).device  # sums over ranks are on the CPU
    values = torch.stack([number.double().to(device) for number in numbers]).tolist()
    result = dict(zip(scalars, values, strict=False))
    totals, counts = values[len(scalars) : len(scalars) + len(names)], values[len(scalars) + len(names) :]
    return result | {name: a / n for name, a, n in zip(names, totals, counts, strict=True) if n > 0}
