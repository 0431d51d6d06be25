"""Bytes and seconds that processors spend on one another in a step.

Gradients are summed over ranks once for a step, in float32. With the optimizer's state shared out, each rank receives
the sum of its own part and sends the new weights of that part. New weights go to the sampler once for a step.
Between nodes the sum is hierarchical: inside the node, then each processor's eighth between nodes, then inside again.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastrl.plan.machine import Machine
from fastrl.plan.workload import Workload

ROLLOUT_BYTES = 16  # of a token that every rank hears of: its id, log-probability and version


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one processor sends in a step.

    Attributes:
        name: what for.
        bytes: sent by one processor.
        seconds: at the links' rates, nothing overlapped.
    """

    name: str
    bytes: float
    seconds: float


def transfers(
    work: Workload, machine: Machine, *, ranks: int, shards_optimizer: bool, element: int = 2
) -> list[Transfer]:
    """Everything that a step sends on `ranks` processors; empty on one."""
    if ranks == 1:
        return []
    gradient = 4.0 * work.trainable
    rollouts = ROLLOUT_BYTES * work.sampled_tokens * (ranks - 1)
    if shards_optimizer:
        update = [
            _ring("gradients, reduce-scatter, float32", gradient, 1, machine, ranks),
            _ring("weights, all-gather", float(element) * work.trainable, 1, machine, ranks),
        ]
    else:
        update = [_ring("gradients, all-reduce, float32", gradient, 2, machine, ranks)]
    return [
        *update,
        Transfer("rollouts and rewards, all-gather", rollouts, rollouts / _slowest(machine, ranks)),
        push(work, machine, ranks=ranks, element=element),
    ]


def push(work: Workload, machine: Machine, *, ranks: int, element: int = 2) -> Transfer:
    """New weights, or adapters alone, to the sampler: a broadcast that passes through every processor once."""
    size = float(element) * work.trainable
    return Transfer("weights to the sampler, broadcast", size, size / _slowest(machine, ranks))


def _ring(name: str, size: float, times: int, machine: Machine, ranks: int) -> Transfer:
    """A ring sends (n - 1) / n of the data for each of reduce-scatter and all-gather."""
    inside = min(ranks, machine.per_node)
    nodes = -(-ranks // machine.per_node)
    within = times * size * (inside - 1) / inside
    between = times * size / inside * (nodes - 1) / nodes
    return Transfer(name, within + between, within / machine.link + between / machine.network)


def _slowest(machine: Machine, ranks: int) -> float:
    return machine.link if ranks <= machine.per_node else machine.network
