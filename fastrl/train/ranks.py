"""How many processes train together, as the launcher says it: torch is not imported, so that rules can ask first.

torchrun (and every launcher that speaks its language) gives each process RANK, WORLD_SIZE, LOCAL_RANK and
LOCAL_WORLD_SIZE, and the address where rank 0 waits for the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The place of this process among those that train together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on this machine, which is that of its GPU.
        local_size: how many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched_ranks() -> Ranks:
    """The place a launcher gave this process; one process alone when there was none."""
    if any(name not in os.environ for name in NEEDED):
        return Ranks()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A launcher that starts one process on each machine may leave out the local numbers.
    return Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
