"""Who does what: micro-batches, sequences and prompts dealt out to the ranks, and what they found put together again.

Every rank has the whole step's data and computes the same weights from it (averaging is data); a rank's share is only
what it runs through the model. Shares are functions of the data and the number of ranks: nobody has to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrl.data.pack import TokenSequence, pack
from fastrl.train.config import TrainConfig
from fastrl.train.distributed import add_up, rank, size
from fastrl.types import TokenBatch


def step_size(config: TrainConfig) -> int:
    """Rows or completions of one optimizer step, over all ranks, as TRL counts them."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * size()


def packed_for_ranks(
    sequences: Sequence[TokenSequence],
    *,
    token_budget: int,
    device: torch.device | str,
    group: Sequence[int] | None = None,
) -> list[TokenBatch]:
    """Pack all sequences of a step so that every rank gets about the same number of tokens; arguments as `pack`.

    Returns:
        The batches of all ranks, the same on each; `own_batches` says which are this rank's.
    """
    return pack(sequences, token_budget=token_budget, group=group, device=device, parts=size())


def own_batches(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """The batches of this rank, in their order: all of them when it is alone."""
    return [batches[place] for place in dealt([len(batch.target) for batch in batches], parts=size())[rank()]]


def of_every_batch(
    batches: Sequence[TokenBatch], measure: Callable[[TokenBatch], Sequence[Tensor]], *, columns: int, what: str
) -> list[list[Tensor]]:
    """Columns of numbers about every batch of a step, each measured on the rank that has the batch.

    Args:
        measure: batch -> `columns` tensors [T] f32, without gradient.
        what: is measured, in words.

    Returns:
        [columns][batches] tensors [T] f32 on the device of the batches, the same on every rank.

    Cost: one sum over the ranks of 4 bytes for each column and position; the places of the others are zeros.
    """
    mine = {id(batch) for batch in own_batches(batches)}
    found = [
        [value.float() for value in measure(batch)]
        if id(batch) in mine
        else [torch.zeros(len(batch.target), device=batch.target.device) for _ in range(columns)]
        for batch in batches
    ]
    add_up([value for values in found for value in values], what)
    return [[values[column] for values in found] for column in range(columns)]


def places_of_ranks(n: int) -> list[list[int]]:
    """The places in a list of n that are each rank's, dealt out in turn."""
    return [list(range(first, n, size())) for first in range(size())]


def dealt(costs: Sequence[int], *, parts: int) -> list[list[int]]:
    """Places of the items of each part, ascending, so that the parts cost about the same.

    Longest first, each to the part that has least so far; ties go to the first. The largest part is at most 4/3 of the
    best one (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    total = [0] * parts
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = min(range(parts), key=total.__getitem__)
        found[least].append(place)
        total[least] += costs[place]
    return [sorted(part) for part in found]
