"""The order in which a run visits its rows: a function of (seed, ordinal), so a cursor is all there is to save."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the rows 0 .. n - 1 in the order of one epoch, a permutation fixed by (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(n, generator=generator).tolist())


def row_at(ordinal: int, *, n: int, seed: int) -> int:
    """Return the row that the run visits as its `ordinal`-th, counting over all epochs."""
    epoch, position = divmod(ordinal, n)
    return epoch_order(n, seed, epoch)[position]
