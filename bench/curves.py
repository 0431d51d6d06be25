"""Time and memory against one size at a time: `python -m bench.curves [AXIS ...]`.

    rows, width, vocabulary   the single pass of the policy loss beside eager autograd
    context                   a whole training step of as many tokens, in longer and longer sequences
    generations               a whole training step of two prompts with larger and larger groups

Each axis doubles a few times; the slope of a straight line through log(time) over log(size) is what is recorded
besides the points: 1 is linear. Ranks cannot be measured on one processor: `fastrl plan --gpus` calculates them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import training_step
from bench.__main__ import ROOT, provenance
from bench.linear_token_loss import eager, policy_inputs, single_pass
from bench.measure import step
from bench.training_step import SMALL, Case
from fastrl.plan.lengths import Lengths
from fastrl.testing import MemoryMeter
from fastrl.train.optimizer import MasterAdamW

Call = Callable[[], object]
RUNS = 3


@dataclass(frozen=True, slots=True)
class Axis:
    """One size that grows.

    Attributes:
        values: of the size, each twice the one before.
        calls: value -> contender -> one run of it, and the tensors that exist before.
    """

    values: tuple[int, ...]
    calls: Callable[[int], tuple[dict[str, Call], list[torch.Tensor]]]


def head_calls(n: int, d: int, v: int) -> tuple[dict[str, Call], list[torch.Tensor]]:
    """Forward and backward of the policy loss over a head."""
    inputs = policy_inputs(n, d, v, dtype=torch.float32, device="cpu")
    ours = partial(single_pass, backend="torch")
    return {"fastrl": step(ours, inputs, (0, 1)), "eager": step(eager, inputs, (0, 1))}, list(inputs)


def step_calls(case: Case) -> tuple[dict[str, Call], list[torch.Tensor]]:
    """A training step with its optimizer."""
    model = training_step.random_model(case.shape, case.lengths, dtype=torch.float32, device="cpu")
    optimizer = MasterAdamW(model)
    call = training_step.contenders(case, model, optimizer, training_step.replayed(case))["fastrl"]
    call()  # the moments exist from the first step on
    return {"fastrl": call}, list(optimizer.state_dict().values())


TINY = replace(SMALL, hidden=128, layers=2, heads=4, kv_heads=2, intermediate=384, vocab=1024)


def _context(length: int) -> tuple[dict[str, Call], list[torch.Tensor]]:
    lengths = Lengths(prompt=8, median=length - 8, longest=length, sigma=0.0)
    return step_calls(Case(TINY, 1, 4096 // length, lengths, 0.0, 4096))


def _generations(size: int) -> tuple[dict[str, Call], list[torch.Tensor]]:
    return step_calls(Case(TINY, 2, size, Lengths(prompt=16, median=64, longest=64, sigma=0.0), 0.0, 2048))


AXES = {
    "rows": Axis((256, 512, 1024, 2048), lambda n: head_calls(n, 128, 4096)),
    "width": Axis((64, 128, 256, 512), lambda d: head_calls(512, d, 4096)),
    "vocabulary": Axis((1024, 2048, 4096, 8192), lambda v: head_calls(512, 128, v)),
    "context": Axis((128, 256, 512, 1024), _context),
    "generations": Axis((2, 4, 8, 16), _generations),
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
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / "curves.cpu.jsonl").open("w") as file:
        for name in options.axes or AXES:
            for record in measured(name, AXES[name]):
                slopes = f"time {record['slope']:.2f}  memory {record['memory_slope']:.2f}"
                print(f"{name:12} {record['contender']:8} slopes: {slopes}", flush=True)
                file.write(json.dumps({"row": "curve", **record, **origin}) + "\n")


def measured(name: str, axis: Axis) -> Iterator[dict[str, Any]]:
    """One record per contender: its points, and the slopes of time and memory."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for value in axis.values:
        calls, before = axis.calls(value)
        for contender, call in calls.items():
            points.setdefault(contender, []).append((value, _milliseconds(call), _peak_mib(call, before)))
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


def _milliseconds(call: Call) -> float:
    """The best of a few: a curve is about the size, not about who else is running."""
    call()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def _peak_mib(call: Call, before: list[torch.Tensor]) -> float:
    with MemoryMeter(*before) as meter:
        call()
    return float(meter.peak_bytes) / 2**20


if __name__ == "__main__":
    main()
