"""How many processes train together, as the launcher says it: torch is not imported, so that rules can ask first.

torchrun (and every launcher that speaks its language) gives each process RANK, WORLD_SIZE, LOCAL_RANK and
LOCAL_WORLD_SIZE, and the address where rank 0 waits for the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
REMEDY = "start with torchrun, which sets it, or unset RANK and WORLD_SIZE to train in one process"


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
    """The place a launcher gave this process; one process alone when there was none.

    Raises:
        ValueError: the launcher's variables are no numbers, contradict each other, or do not say where to meet.
    """
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE")):
        return Ranks()
    # A launcher that starts one process on each machine may leave out the local numbers.
    found = Ranks(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))
    if found.rank >= found.size:
        raise ValueError(f"RANK is {found.rank} and WORLD_SIZE {found.size}: ranks are numbered from 0; {REMEDY}")
    if found.local_size < 1:
        raise ValueError(f"LOCAL_WORLD_SIZE is 0: it counts this process too; {REMEDY}")
    if missing := [name for name in MEETING_POINT if name not in os.environ]:
        if found.size == 1:
            return Ranks()
        raise ValueError(
            f"RANK and WORLD_SIZE say that {found.size} processes train together, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: nobody could be met; {REMEDY}"
        )
    if not 0 < _number("MASTER_PORT") < 2**16:
        raise ValueError(f"MASTER_PORT is {os.environ['MASTER_PORT']}, and ports are 1 to 65535; {REMEDY}")
    return found


def _number(name: str, default: int | None = None) -> int:
    """A launcher's variable, which counts something."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} is {text!r}, and must be a number from 0; {REMEDY}")
    return int(text)
