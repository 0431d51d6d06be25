"""How several processes train one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DistributedBlock:
    """What ranks started by torchrun keep and how long they wait for each other; nothing of it changes the result.

    Attributes:
        shard: what is kept once over all ranks and not once on each: "none", or "optimizer" for the float32 master
            weights and AdamW's moments. A process alone keeps all of it either way.
        timeout_seconds: longest wait of a rank for the others at one message: longer than the slowest rank needs to
            sample and judge its share of a round.
    """

    shard: Literal["none", "optimizer", "full"] = "none"
    timeout_seconds: float = 1800.0
