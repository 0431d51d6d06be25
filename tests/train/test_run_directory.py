from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastrl.train.config import GRPOConfig
from fastrl.train.run_directory import RunDirectoryError, config_differences, open_run_directory

CONFIG: dict[str, Any] = asdict(GRPOConfig(model_name_or_path="m", output_dir="o", train_dataset="d"))


def test_a_new_run_records_its_configuration_and_its_owner(tmp_path: Path) -> None:
    with open_run_directory(tmp_path / "a" / "b", CONFIG, resume=None) as run:
        assert run.path == tmp_path / "a" / "b"
        assert json.loads((run.path / "run.json").read_text())["rollout"] == json.loads(json.dumps(CONFIG["rollout"]))
        assert json.loads((run.path / "owner.json").read_text())["pid"] == os.getpid()


def test_a_used_directory_needs_resume_or_another_name(tmp_path: Path) -> None:
    open_run_directory(tmp_path, CONFIG, resume=None).close()
    open_run_directory(tmp_path, CONFIG, resume=None).close()  # opened but never used: a fresh start is harmless
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(RunDirectoryError, match=r"used \(checkpoint-3\); pass --resume auto or another --output_dir"):
        open_run_directory(tmp_path, CONFIG, resume=None)
    open_run_directory(tmp_path, CONFIG, resume="auto").close()
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="is a file"):
        open_run_directory(tmp_path / "file", CONFIG, resume=None)


def test_a_directory_that_was_never_a_run_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunDirectoryError, match=r"is no run directory \(no run\.json\)"):
        open_run_directory(tmp_path, CONFIG, resume="auto")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"run\.json is not JSON"):
        open_run_directory(tmp_path, CONFIG, resume="auto")


def test_resume_with_another_meaning_lists_the_differences_and_changes_nothing(tmp_path: Path) -> None:
    open_run_directory(tmp_path, CONFIG, resume=None).close()
    (tmp_path / "checkpoint-3").mkdir()
    stored = (tmp_path / "run.json").read_bytes()
    changed = CONFIG | {"learning_rate": 3e-6, "rollout": CONFIG["rollout"] | {"max_prompt_length": 9}, "new": 1}
    expected = r"learning_rate: 1e-06 -> 3e-06; new: absent -> 1; rollout\.max_prompt_length: null -> 9$"
    with pytest.raises(RunDirectoryError, match=expected):
        open_run_directory(tmp_path, changed, resume="auto")
    assert (tmp_path / "run.json").read_bytes() == stored
    open_run_directory(tmp_path, CONFIG, resume="auto").close()  # the failed attempt gave the lock back


def test_fields_that_only_cost_or_show_may_change(tmp_path: Path) -> None:
    free = {
        "save_steps": 7,
        "resume_from_checkpoint": "auto",
        "packing": {"token_budget": 5},
        "rollout": CONFIG["rollout"] | {"batch_size": 3},
        "report": CONFIG["report"] | {"panel": False},
    }
    assert config_differences(CONFIG, CONFIG | free) == []
    assert config_differences(CONFIG, CONFIG | {"max_steps": 7}) == ["max_steps: -1 -> 7"]


def test_tuples_of_the_configuration_equal_the_lists_of_its_json() -> None:
    assert config_differences(json.loads(json.dumps(CONFIG)), CONFIG) == []


def test_a_second_run_in_the_directory_is_refused_and_the_owner_named(tmp_path: Path) -> None:
    with (
        open_run_directory(tmp_path, CONFIG, resume=None),
        pytest.raises(RunDirectoryError, match=rf'another run is using .*"pid": {os.getpid()}'),
    ):
        open_run_directory(tmp_path, CONFIG, resume="auto")
    open_run_directory(tmp_path, CONFIG, resume=None).close()


def _try_to_open(path: Path, start: Any, stop: Any, opened: Any) -> None:
    start.wait()
    try:
        run = open_run_directory(path, CONFIG, resume=None)
    except RunDirectoryError:
        opened.put(False)
        return
    opened.put(True)
    stop.wait()
    run.close()


def test_of_many_starts_at_once_one_gets_the_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, stop, opened = context.Event(), context.Event(), context.Queue()
    processes = [context.Process(target=_try_to_open, args=(tmp_path, start, stop, opened)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    results = sorted(opened.get(timeout=60) for _ in processes)
    stop.set()
    for process in processes:
        process.join()
    assert results == [False, False, True]


def test_the_first_signal_is_a_request_and_the_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with open_run_directory(tmp_path, CONFIG, resume=None) as run:
        assert not run.interrupted()
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.interrupted()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("signals", "status"), [(1, 75), (2, 128 + signal.SIGTERM)])
def test_one_signal_lets_the_run_save_and_exit_75_and_two_end_it_at_once(signals: int, status: int) -> None:
    program = (
        "import os, signal, sys\n"
        "from fastrl.train.interrupt import EXIT_INTERRUPTED, Interrupt\n"
        "with Interrupt() as interrupt:\n"
        f"    for _ in range({signals}):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(EXIT_INTERRUPTED if interrupt.requested() else 1)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status
    assert "saving a checkpoint after this step" in done.stderr


def test_a_step_of_the_same_size_is_the_same_run_whoever_computes_it() -> None:
    old = CONFIG | {"per_device_train_batch_size": 8}  # written before runs said how many ranks they had
    assert config_differences(old, old | {"per_device_train_batch_size": 2, "ranks": 4}) == []
    assert config_differences(old | {"ranks": 2}, old | {"gradient_accumulation_steps": 4, "ranks": 1}) == [
        "per_device_train_batch_size x gradient_accumulation_steps x ranks: 16 -> 32"
    ]
