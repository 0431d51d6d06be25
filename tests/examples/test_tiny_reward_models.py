"""The examples of reward models run as a reader runs them, and their logs show that they learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl import cli
from fastrl.report import read_log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "first", "last"),
    [
        ("reward", "eval/accuracy", 0.5, 0.95),
        ("prm", "eval/solution_accuracy", 0.3, 0.75),
        ("genrm", "eval/loss", 0.4, 0.15),  # half of log 2 for a coin's verdict and a certain end
    ],
)
def test_an_example_ends_better_than_it_began(inside: Path, name: str, metric: str, first: float, last: float) -> None:
    assert cli.main(["run", f"examples/tiny/{name}.yaml", "--report.panel", "false"]) == 0
    curve = [line[metric] for line in read_log(inside / "runs" / f"tiny-{name}" / "metrics.jsonl") if metric in line]
    if metric == "eval/loss":
        assert first > curve[0] > curve[-1]
        assert curve[-1] < last
        return
    assert curve[0] >= first
    assert curve[-1] >= last
