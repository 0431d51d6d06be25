from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastrl.report import JsonLines, MetricsLog, log_errors, read_log
from fastrl.rewards import RewardError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_a_step_is_one_line_with_plain_numbers(path, opened):
    log = opened(MetricsLog(path, clock=lambda: 1700000000.12345))
    log.write(3, {"reward": 0.1, "num_tokens": 7, "kl": np.float32(0.5), "steps": np.int64(2), "half": Fraction(1, 2)})
    expected = (
        '{"step": 3, "time": 1700000000.123, "reward": 0.1, "num_tokens": 7, "kl": 0.5, "steps": 2, "half": 0.5}\n'
    )
    assert path.read_text() == expected


def test_floats_come_back_to_the_last_digit(path, opened):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": -1 / 3}
    opened(MetricsLog(path)).write(1, values)
    assert {name: read_log(path)[0][name] for name in values} == values


def test_non_finite_values_become_null_and_are_counted(path, opened):
    log = opened(MetricsLog(path, clock=lambda: 0.0))
    log.write(1, {"loss": float("nan"), "kl": float("inf"), "reward": 1.0})
    log.write(2, {"loss": 0.5})
    log.write(3, {"loss": float("-inf")})
    assert log.nonfinite == 3
    assert read_log(path) == [
        {"step": 1, "time": 0.0, "loss": None, "kl": None, "reward": 1.0, "nonfinite": 2},
        {"step": 2, "time": 0.0, "loss": 0.5},
        {"step": 3, "time": 0.0, "loss": None, "nonfinite": 1},
    ]


@pytest.mark.parametrize("value", [torch.tensor(1.0), "1", None, [1.0]])
def test_what_is_not_a_number_is_refused_by_name(path, value, opened):
    with pytest.raises(ValueError, match="metric 'loss' must be a number, got"):
        opened(MetricsLog(path)).write(1, {"loss": value})
    assert path.read_text() == ""


@pytest.mark.parametrize("name", ["step", "time", "nonfinite"])
def test_the_logs_own_names_are_refused(path, name, opened):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        opened(MetricsLog(path)).write(1, {name: 1.0})


def test_cutting_back_to_a_checkpoint_and_going_on_gives_the_same_bytes(path, opened):
    log = opened(MetricsLog(path, clock=lambda: 0.0))
    for step in range(5):
        log.write(step, {"loss": step / 7})
    whole = path.read_bytes()
    log.close()

    resumed = opened(MetricsLog(path, clock=lambda: 0.0))
    assert resumed.offset == len(whole)
    offset = len(b"".join(whole.splitlines(keepends=True)[:2]))
    resumed.truncate_to(offset)
    assert resumed.offset == offset
    assert [line["step"] for line in read_log(path)] == [0, 1]
    for step in range(2, 5):
        resumed.write(step, {"loss": step / 7})
    assert path.read_bytes() == whole
    resumed.truncate_to(0)
    assert read_log(path) == []


def test_a_checkpoint_of_another_log_is_refused(path, opened):
    log = opened(MetricsLog(path))
    log.write(1, {"loss": 1.0})
    size = log.offset
    with pytest.raises(ValueError, match=f"has {size} bytes, but the checkpoint was taken at {size + 1}"):
        log.truncate_to(size + 1)
    with pytest.raises(ValueError, match="no line ends at byte 5"):
        log.truncate_to(5)
    assert log.offset == size


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"x" * 200_000])
def test_a_torn_last_line_is_not_read_and_removed_on_opening(path, torn, opened):
    opened(MetricsLog(path, clock=lambda: 0.0)).write(1, {})
    with path.open("ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_log(path)] == [1]
    opened(MetricsLog(path, clock=lambda: 0.0)).write(3, {})
    assert [line["step"] for line in read_log(path)] == [1, 3]


def test_a_file_that_is_only_a_torn_line_becomes_empty(path, opened):
    path.parent.mkdir()
    path.write_bytes(b'{"step"')
    assert opened(JsonLines(path)).offset == 0


def test_a_broken_line_in_the_middle_is_named(path):
    path.parent.mkdir()
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        read_log(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 must hold a JSON object, got list"):
        read_log(path)


def test_every_line_written_before_a_kill_is_there(path):
    code = (
        "import sys, itertools\nfrom fastrl.report.log import MetricsLog\nlog = MetricsLog(sys.argv[1])\n"
        "for step in itertools.count():\n    log.write(step, {'loss': step / 7})\n    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(50):
        last = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = [line["step"] for line in read_log(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > last == 49


def test_errors_of_rewards_have_one_line_each(path, opened):
    log_errors(opened(JsonLines(path)), 7, {"judge": RewardError(3, "Traceback"), "other": RewardError(1, "nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 7, "reward": "judge", "count": 3, "message": "Traceback"},
        {"step": 7, "reward": "other", "count": 1, "message": "nan"},
    ]


def test_writing_a_step_costs_well_under_a_millisecond(path, opened):
    log = opened(MetricsLog(path))
    metrics = {f"metric/{index}": index / 3 for index in range(40)}
    start = time.process_time()
    for step in range(200):
        log.write(step, metrics)
    assert (time.process_time() - start) / 200 < 1e-3
