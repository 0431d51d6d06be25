"""The GPU session survives children that crash, hang or write half a line, ends in time, and names the fastest tile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_items, gpu_session
from bench.tune import best, timed

CHILD = """
import json, os, sys, time
skip, path = int(sys.argv[1]), sys.argv[2]
with open(path, "a", buffering=1) as file:
    file.write("\\n")
    for number, what in enumerate({script!r}):
        if number < skip:
            continue
        file.write(json.dumps({{"item": what, "item_number": number}}) + "\\n")
        if what == "crash":
            file.write('{{"half": ')
            file.flush()
            os._exit(7)
        if what == "hang":
            time.sleep(60)
        file.write(json.dumps({{"value": number}}) + "\\n")
"""


def run(script: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 30) -> dict[str, Any]:
    """A stage whose children follow the script."""
    real = gpu_session._start

    def start(command: list[str], environment: dict[str, str], log: Any) -> Any:
        skip = command[command.index("--skip") + 1]
        code = CHILD.format(script=script)
        return real([sys.executable, "-S", "-c", code, skip, str(tmp_path / "check.jsonl")], environment, log)

    monkeypatch.setattr(gpu_session, "_start", start)
    (tmp_path / "check.jsonl").write_text("")
    with (tmp_path / "log.txt").open("w") as log:
        return gpu_session.items("check", tmp_path, time.monotonic() + seconds, log, dict(os.environ), True)


def values(tmp_path: Path) -> list[int]:
    return [x["value"] for x in gpu_session._records(tmp_path / "check.jsonl") if "value" in x]


def test_a_child_that_crashes_is_replaced_and_the_next_item_is_done(tmp_path, monkeypatch):
    done = run(["ok", "crash", "ok", "crash", "ok"], tmp_path, monkeypatch)
    assert values(tmp_path) == [0, 2, 4]
    assert done["finished"]


def test_a_child_that_hangs_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "SILENCE", 2.0)
    done = run(["ok", "hang", "ok"], tmp_path, monkeypatch)
    assert values(tmp_path) == [0, 2]
    assert done["finished"]


def test_a_stage_ends_in_time_and_says_that_it_is_not_finished(tmp_path, monkeypatch):
    begin = time.monotonic()
    done = run(["ok", "hang"], tmp_path, monkeypatch, seconds=2.0)
    assert time.monotonic() - begin < 10
    assert (done["finished"], done["ok"]) == (False, False)
    assert values(tmp_path) == [0]


def test_a_child_that_cannot_start_is_given_up_after_three_tries(tmp_path, monkeypatch):
    starts = []
    real = gpu_session._start

    def start(command: list[str], environment: dict[str, str], log: Any) -> Any:
        starts.append(command)
        return real([sys.executable, "-S", "-c", "raise SystemExit(5)"], environment, log)

    monkeypatch.setattr(gpu_session, "_start", start)
    (tmp_path / "check.jsonl").write_text("")
    with (tmp_path / "log.txt").open("w") as log:
        done = gpu_session.items("check", tmp_path, time.monotonic() + 30, log, dict(os.environ), True)
    assert len(starts) == 3
    assert not done["finished"]


def test_the_fastest_candidate_of_each_shape_wins_and_failures_do_not():
    def record(candidate: str, **rest: Any) -> dict[str, Any]:
        return {"architecture": "sm_90", "kernel": "gae", "shape": {"longest": 8}, "candidate": candidate, **rest}

    found = best([record("a", milliseconds=2.0), record("b", milliseconds=1.0), record("c", failed="OutOfResources")])
    assert found == {"sm_90 gae longest=8": {"best": "b", "milliseconds": {"a": 2.0, "b": 1.0}}}


def test_a_candidate_that_cannot_run_is_recorded_beside_those_that_can():
    from bench.tune import Job

    def broken() -> None:
        raise RuntimeError("out of resource: shared memory")

    job = Job("gae", {"longest": 8}, lambda device, small: {"fits": lambda: None, "does not": broken})
    fits, does_not = timed(job, "cpu", small=True)
    assert fits["milliseconds"] >= 0
    assert "shared memory" in does_not["failed"]


def test_a_child_that_talks_into_the_log_alone_is_not_hung(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "SILENCE", 2.0)
    (tmp_path / "check.jsonl").write_text("")
    talking = "import time\nfor _ in range(8):\n    print('turn', flush=True)\n    time.sleep(0.5)"
    with (tmp_path / "log.txt").open("w") as log:
        process = gpu_session._start([sys.executable, "-S", "-c", talking], dict(os.environ), log)
        paths = (tmp_path / "check.jsonl", tmp_path / "log.txt")
        assert gpu_session._watch(process, paths, time.monotonic() + 30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_session_that_is_ended_leaves_no_child(number, tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"""
import sys
sys.path.insert(0, {str(gpu_session.ROOT)!r})
from bench import gpu_session
real = gpu_session._start
gpu_session._start = lambda command, environment, log: real([sys.executable, "-S", "-c", {child!r}], environment, log)
sys.argv = ["gpu_session", "--out", {str(tmp_path / "out")!r}, "--minutes", "1"]
gpu_session.main()
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "nan"], "--minutes must be above 0"),
        (["--minutes", "0"], "--minutes must be above 0"),
        ([], "has results already or is a file; name a new folder"),
    ],
)
def test_what_would_measure_nothing_or_lose_results_is_refused(arguments, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "bench.jsonl").write_text('{"row": "precious"}')
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu_session.main()
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "bench.jsonl").read_text() == '{"row": "precious"}'


def test_a_relative_folder_is_that_of_the_shell_for_the_children_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--out", "out", "--dry-run"])
    found = []
    monkeypatch.setattr(gpu_session, "session", lambda out, *_, **__: found.append(out) or 0)
    assert gpu_session.main() == 0
    assert found == [tmp_path / "out"]


def test_the_telling_rows_come_first_and_each_row_once(monkeypatch):
    monkeypatch.setattr(gpu_items, "FIRST", (("b", "small"), ("gone", "small"), ("rollout", "tiny")))
    rows = {name: SimpleNamespace(shapes={"large": (2,), "small": (1,)}) for name in ("a", "b")}
    monkeypatch.setattr("bench.registry.all_rows", lambda: rows)
    monkeypatch.setattr("bench.training_step.GPU_CASES", {"0.6b": None})
    monkeypatch.setattr("bench.supervised_step.GPU_CASES", {"sft": None})
    monkeypatch.setattr("bench.rollout.GPU_CASES", {"tiny": None, "30M": None})
    programs = [("training_step", "0.6b"), ("supervised_step", "sft"), ("rollout", "30M")]
    others = [*programs, ("a", "large"), ("a", "small"), ("b", "large")]
    assert gpu_items.ordered("cuda") == [("b", "small"), ("rollout", "tiny"), *others]


def test_a_program_whose_package_is_missing_says_so_and_the_others_run(monkeypatch):
    real = gpu_items._program

    def missing(name: str) -> Any:
        if name == "supervised_step":
            raise ModuleNotFoundError("No module named 'rich'")
        return real(name)

    monkeypatch.setattr(gpu_items, "_program", missing)
    monkeypatch.setattr("bench.__main__._gpu_state", dict)
    listed = gpu_items.ordered("cuda")
    assert ("supervised_step", "sft, qwen3-0.6b, 2k") in listed
    (record,) = gpu_items.bench_records("supervised_step", "sft, qwen3-0.6b, 2k", "cpu")
    assert record["cannot_run"] == "No module named 'rich'"
    assert [name for name, _ in gpu_items.ordered("cpu")] == [name for name, _ in gpu_items.DRY]


def test_the_telling_rows_and_cases_exist():
    sources = "".join(path.read_text() for path in Path(gpu_items.__file__).parent.glob("*.py"))
    for name, shape in (*gpu_items.FIRST, *((name, label or "") for name, label in gpu_items.DRY)):
        if name in gpu_items.PROGRAMS:
            program = gpu_items._program(name)
            assert shape in program.GPU_CASES | program.CPU_CASES
        else:
            assert f'name="{name}"' in sources
            assert f'"{shape}' in sources  # shapes of several rows are listed once


def test_every_program_gives_records_with_a_case_and_a_time():
    for name, label in gpu_items.DRY[-1:]:  # the others are slower, and `--dry-run` runs them
        found = list(gpu_items.bench_records(name, label, "cpu"))
        assert {record["contender"] for record in found} == {"generate", "fastrl"}
        assert all(record["row"] == name and record["shape"]["name"] == label for record in found)
        assert min(record["ms"] for record in found) > 0


def test_a_finding_of_any_stage_is_the_session_s(tmp_path, monkeypatch):
    # The stages themselves are too slow here; `--dry-run` runs them.
    monkeypatch.setattr(gpu_session, "tests", lambda *_: {"ok": True})
    monkeypatch.setattr(gpu_session, "items", lambda stage, *_: {"ok": stage != "bench"})
    assert gpu_session.session(tmp_path, 20.0, dry=True) == 1
    summary = json.loads((tmp_path / "session.json").read_text())
    assert list(summary["stages"]) == ["tests", "check", "bench", "tune"]
    assert json.loads((tmp_path / "tuned.json").read_text()) == {}
