"""Time and memory against one size at a time: `python -m bench.curves [AXIS ...]`.

    rows, width, vocabulary   the single pass of the policy loss beside eager autograd
    context                   a whole training step of as many tokens, in longer and longer sequences
    generations               a whole training step of two prompts with larger and larger groups
    ranks                     the same training step by more and more processes of one thread each

Each axis doubles a few times; the slope of a straight line through log(time) over log(size) is what is recorded
besides the points: 1 is linear, and -1 is what perfect ranks would have. There are as many ranks as cores at most;
`fastrl plan --gpus` calculates what more of them on GPUs would do.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import training_cases, training_step
from bench.__main__ import ROOT, provenance
from bench.linear_token_loss import eager, policy_inputs, single_pass
from bench.measure import step
from bench.records import put
from bench.training_cases import SMALL, Case
from fastrl.plan.lengths import Lengths
from fastrl.testing import MemoryMeter
from fastrl.train.optimizer import MasterAdamW

Call = Callable[[], object]
Point = tuple[float, float]  # milliseconds, MiB
RUNS = 3
RANKS_SECONDS = 120.0  # after which processes that should have met are ended


@dataclass(frozen=True, slots=True)
class Axis:
    """One size that grows.

    Attributes:
        values: of the size, each twice the one before.
        points: value -> contender -> its time and memory.
    """

    values: tuple[int, ...]
    points: Callable[[int], dict[str, Point]]


def head_points(n: int, d: int, v: int) -> dict[str, Point]:
    """Forward and backward of the policy loss over a head."""
    inputs = policy_inputs(n, d, v, dtype=torch.float32, device="cpu")
    ours = partial(single_pass, backend="torch")
    calls = {"fastrl": step(ours, inputs, (0, 1)), "eager": step(eager, inputs, (0, 1))}
    return {name: measured_call(call, list(inputs)) for name, call in calls.items()}


def step_point(case: Case) -> Point:
    """A training step with its optimizer; on several ranks each has its share."""
    model = training_cases.random_model(case.shape, case.lengths, dtype=torch.float32, device="cpu")
    optimizer = MasterAdamW(model)
    call = training_step.contenders(case, model, optimizer, training_cases.replayed(case))["fastrl"]
    call()  # the moments exist from the first step on
    return measured_call(call, list(optimizer.state_dict().values()))


TINY = replace(SMALL, hidden=128, layers=2, heads=4, kv_heads=2, intermediate=384, vocab=1024)
# 16 micro-batches: no rank waits for another's last one for long.
SHARED_OUT = Case(SMALL, 8, 8, Lengths(prompt=24, median=64, longest=104, sigma=0.4), 0.0, 384)


def _context(length: int) -> dict[str, Point]:
    lengths = Lengths(prompt=8, median=length - 8, longest=length, sigma=0.0)
    return {"fastrl": step_point(Case(TINY, 1, 4096 // length, lengths, 0.0, 4096))}


def _generations(size: int) -> dict[str, Point]:
    lengths = Lengths(prompt=16, median=64, longest=64, sigma=0.0)
    return {"fastrl": step_point(Case(TINY, 2, size, lengths, 0.0, 2048))}


def _ranks(n: int) -> dict[str, Point]:
    """One step by n processes, as torchrun would start them.

    Raises:
        RuntimeError: one of them failed, with what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.rank_step"],
            cwd=ROOT.parent,
            env=os.environ | {key: str(value) for key, value in (shared | {"RANK": i, "LOCAL_RANK": i}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(n)
    ]
    end = time.monotonic() + RANKS_SECONDS
    codes: list[int | None] = [None] * n
    try:
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
            codes = [each.poll() for each in processes]
    finally:
        for process in processes:
            process.kill()
    said = [process.communicate()[0] for process in processes]
    if codes != [0] * n:
        raise RuntimeError(f"ranks ended with {codes} (None: it was still at work) and said:\n" + "\n".join(said))
    ms, mib = json.loads(said[0].splitlines()[-1])
    return {"fastrl": (ms, mib)}


AXES = {
    "rows": Axis((256, 512, 1024, 2048), lambda n: head_points(n, 128, 4096)),
    "width": Axis((64, 128, 256, 512), lambda d: head_points(512, d, 4096)),
    "vocabulary": Axis((1024, 2048, 4096, 8192), lambda v: head_points(512, 128, v)),
    "context": Axis((128, 256, 512, 1024), _context),
    "generations": Axis((2, 4, 8, 16), _generations),
    "ranks": Axis(tuple(n for n in (1, 2, 4, 8, 16) if n <= max(2, os.cpu_count() or 1)), _ranks),
}


def main() -> None:
    """Measure the axes named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"default: all of {', '.join(AXES)}")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    unknown = [name for name in options.axes if name not in AXES]
    if unknown:
        parser.error(f"no axis is called {unknown[0]!r}; there are {', '.join(AXES)}")
    origin = provenance("cpu", quick=False)
    for name in options.axes or AXES:
        found = [{"row": "curve", **record, **origin} for record in measured(name, AXES[name])]
        for record in found:
            slopes = f"time {record['slope']:.2f}  memory {record['memory_slope']:.2f}"
            print(f"{name:12} {record['contender']:8} slopes: {slopes}", flush=True)
        put(options.results / "curves.cpu.jsonl", found)


def measured(name: str, axis: Axis) -> Iterator[dict[str, Any]]:
    """One record per contender: its points, and the slopes of time and memory."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for value in axis.values:
        for contender, (ms, mib) in axis.points(value).items():
            points.setdefault(contender, []).append((value, ms, mib))
    for contender, found in points.items():
        sizes, times, memories = (np.array(column, dtype=float) for column in zip(*found, strict=True))
        yield {
            "axis": name,
            "contender": contender,
            "sizes": sizes.tolist(),
            "times_ms": times.tolist(),
            "peaks_mib": memories.tolist(),
            "slope": slope(sizes, times),
            "memory_slope": slope(sizes, memories),
        }


def slope(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """Of the least-squares line through log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measured_call(call: Call, before: list[torch.Tensor]) -> Point:
    """The best time of a few, as a curve is about the size and not about who else is running, and the peak memory.

    Args:
        before: tensors that are there already.
    """
    call()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    with MemoryMeter(*before) as meter:
        call()
    return min(times), float(meter.peak_bytes) / 2**20


if __name__ == "__main__":
    main()
