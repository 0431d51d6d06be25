"""Seconds to sample a step's completions: continuous batching, played through on the quantiles of the lengths.

one decoding step of B sequences = max((weights + B * context * kv) / bandwidth, 2 * parameters * B / products)
                                   + overhead
"""

from __future__ import annotations

import heapq
import random

from fastrl.plan.machine import Machine
from fastrl.plan.workload import Workload

STEP_OVERHEAD = 1.5e-3  # seconds of scheduling and sampling in each step of an engine: assumed
WEIGHT_SHARE = 0.9  # of the memory that weights and cache may take: vLLM's default
ELEMENT = 2  # bytes


def kv_bytes(work: Workload) -> float:
    """Of one token's keys and values."""
    return float(ELEMENT * work.shape.kv_numbers)


def most_sequences(work: Workload, machine: Machine, *, occupied: float = 0.0) -> int:
    """Sequences of the longest kind whose cache fits beside the weights and `occupied` bytes; 0 when none does."""
    room = WEIGHT_SHARE * machine.memory - occupied - ELEMENT * work.shape.parameters
    return max(0, int(room / (kv_bytes(work) * (work.lengths.prompt + work.lengths.longest))))


def rollout_seconds(work: Workload, machine: Machine, *, sequences: int) -> float:
    """From the first prompt to the last completion's last token on one processor.

    Args:
        sequences: decoded together at most; a place that gets free takes the next prompt.

    Raises:
        ValueError: no sequence fits.
    """
    if sequences < 1:
        raise ValueError(
            "no sequence's keys and values fit into the memory that training leaves for sampling: take a shorter "
            "--context, more --gpus or a smaller model, or sample on GPUs of their own"
        )
    quantiles = work.lengths.completions()
    waiting = [quantiles[i * len(quantiles) // work.completions] for i in range(work.completions)]
    random.Random(0).shuffle(waiting)  # completions do not come sorted by length
    shape = work.shape
    prefill = 2.0 * (shape.backbone + shape.head) * work.prompts * work.lengths.prompt / machine.products
    cached = work.lengths.prompt + work.lengths.mean() / 2  # tokens of a sequence half way through its completion
    position, seconds, ends = 0.0, prefill, list[float]()
    while waiting or ends:
        while waiting and len(ends) < sequences:
            heapq.heappush(ends, position + waiting.pop())
        alive, end = len(ends), heapq.heappop(ends)
        seconds += (end - position) * _step(work, machine, alive, cached)
        position = end
    return seconds


def _step(work: Workload, machine: Machine, alive: int, cached: float) -> float:
    """One token for each of `alive` sequences with `cached` tokens each in the cache."""
    shape = work.shape
    read = (ELEMENT * (shape.backbone + shape.head) + alive * kv_bytes(work) * cached) / machine.bandwidth
    return max(read, 2.0 * (shape.backbone + shape.head) * alive / machine.products) + STEP_OVERHEAD
