"""Slopes of known powers, and a short curve of each kind."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import numpy as np
import pytest

from bench import curves
from bench.curves import AXES, Axis, head_points, measured, slope


def test_the_slope_of_a_power_is_its_exponent() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert slope(x, 3 * x**2) == pytest.approx(2.0)
    assert slope(x, 5 + 0 * x) == pytest.approx(0.0)


def test_memory_of_eager_grows_with_the_vocabulary_and_ours_with_the_weight_alone() -> None:
    axis = Axis((2048, 4096, 8192), lambda v: head_points(1024, 8, v))
    ours, eager = measured("vocabulary", axis)
    assert (ours["contender"], eager["contender"]) == ("fastrl", "eager")
    assert eager["memory_slope"] == pytest.approx(1.0, abs=0.05)
    assert ours["peaks_mib"][-1] < 0.4 * eager["peaks_mib"][-1]
    assert len(ours["times_ms"]) == 3


@pytest.mark.parametrize("name", ["context", "generations"])
def test_a_training_step_is_measured_at_every_size(name: str) -> None:
    (found,) = measured(name, Axis(AXES[name].values[:2], AXES[name].points))
    assert found["sizes"] == list(AXES[name].values[:2])
    assert min(found["times_ms"]) > 0
    assert all(b == 2 * a for a, b in zip(AXES[name].values, AXES[name].values[1:], strict=False))


def test_a_rank_that_fails_ends_the_others_at_once_and_its_words_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys, time\nprint('boom', flush=True)\nos.environ['RANK'] == '1' and sys.exit(3)\ntime.sleep(60)"
    real = subprocess.Popen
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(real([command[0], "-S", "-c", code], **options))
        return started[-1]

    monkeypatch.setattr(curves.subprocess, "Popen", start)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ranks ended with \[None, 3\] .*\nboom"):
        curves._ranks(2)
    assert time.monotonic() - begin < 20
    assert all(process.poll() is not None for process in started)
