"""The registry's rows under pytest-benchmark, for comparing two commits on one CPU.

    pytest bench --benchmark-save before        at one commit
    pytest bench --benchmark-compare            at the other

One shape of each row, what fastrl runs by default on a CPU. `python -m bench` compares contenders and checks values;
this compares times only, so a row that is wrong is caught by the tests, not here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.figures import OURS
from bench.measure import step
from bench.registry import Row, all_rows

ROWS = [row for row in all_rows().values() if any(name in row.contenders for name in OURS["cpu"])]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, benchmark: Any) -> None:
    label, shape = next(iter(row.quick_shapes.items()))
    inputs = row.make_inputs(*shape, dtype=torch.float32, device="cpu")
    for name in (name for name in OURS["cpu"] if name in row.contenders):
        call = step(row.contenders[name], inputs, row.differentiable)
        try:
            call()
        except RuntimeError as reason:
            problem = str(reason)
            continue
        benchmark.extra_info |= {"shape": label, "contender": name}
        benchmark(call)
        return
    pytest.skip(problem)
