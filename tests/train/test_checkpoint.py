from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrl.train import checkpoint, durable
from fastrl.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    resume_point,
    save_checkpoint,
)

TENSORS = {
    "optimizer": {"master.w": torch.tensor([1.0, float("nan"), -0.0]), "step.w": torch.tensor(3.0)},
    "policy": {"w": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "empty": torch.zeros(0, 2)},
}
STATE = {"step": 7, "cursor": [1, 2], "reward": {"mean": 0.1, "name": "é"}, "big": 2**70}


def saved(directory: Path, step: int = 7) -> Path:
    return save_checkpoint(directory, step, tensors=TENSORS, state=STATE)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors, state = load_checkpoint(saved(tmp_path))
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for group, named in TENSORS.items():
        assert tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            got = tensors[group][name]
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert got.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_views_and_transposed_tensors_are_saved_as_their_values(tmp_path: Path) -> None:
    square = torch.arange(4.0).view(2, 2)
    path = save_checkpoint(tmp_path, 1, tensors={"a": {"t": square.T, "row": square[1]}}, state={})
    loaded = load_checkpoint(path)[0]["a"]
    assert loaded["t"].tolist() == [[0.0, 2.0], [1.0, 3.0]]
    assert loaded["row"].tolist() == [2.0, 3.0]


def test_every_flipped_bit_and_every_truncation_is_found_and_the_file_named(tmp_path: Path) -> None:
    good = saved(tmp_path / "good")
    chance = random.Random(0)
    for trial in range(120):
        bad = tmp_path / str(trial) / good.name
        shutil.copytree(good, bad)
        file = chance.choice(sorted(bad.iterdir()))
        content = bytearray(file.read_bytes())
        place = chance.randrange(len(content))
        if trial % 3:
            content[place] ^= 1 << chance.randrange(8)
        else:
            del content[place:]
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=file.name):
            load_checkpoint(bad)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors={}, state={})
    content = (path / "manifest.json").read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (path / "manifest.json").write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_missing_extra_swapped_and_renamed_files_are_found(tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return saved(tmp_path / name)

    for name in ("state.json", "optimizer.safetensors", "manifest.json"):
        path = damaged(f"missing-{name}")
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path)
    path = damaged("extra")
    (path / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is not in manifest\.json"):
        load_checkpoint(path)
    path = damaged("swapped")
    (path / "policy.safetensors").rename(path / "x")
    (path / "optimizer.safetensors").rename(path / "policy.safetensors")
    (path / "x").rename(path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        load_checkpoint(path)
    path = damaged("another step")
    with pytest.raises(CheckpointError, match="another step"):
        load_checkpoint(path.rename(path.with_name("checkpoint-8")))
    other = save_checkpoint(tmp_path / "mixture", 7, tensors=TENSORS, state=STATE | {"step": 6})
    path = damaged("mixture of two runs")
    shutil.copy(other / "state.json", path / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load_checkpoint(path)


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_set_aside(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (2, 10, 9):
        saved(tmp_path, step)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"state\.json is damaged.*renamed to checkpoint-10\.corrupt"):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert (tmp_path / "checkpoint-10.corrupt").is_dir()
    saved(tmp_path, 10)  # its name is free again


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path: Path) -> None:
    (saved(tmp_path) / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"manifest\.json.*renamed"),
        pytest.raises(CheckpointError, match=r"none is whole \(checkpoint-7\.corrupt\)"),
    ):
        newest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="none is whole"):  # again, now that it has its other name
        newest_checkpoint(tmp_path)


def test_a_name_is_never_reused_and_old_checkpoints_go(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(FileExistsError, match="a step's name is never reused"):
        saved(tmp_path)
    for step in (8, 9, 10):
        save_checkpoint(tmp_path, step, tensors={}, state={}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save_checkpoint(tmp_path, 11, tensors={}, state={}, keep=0)


def test_resume_point_takes_auto_or_the_last_checkpoint_of_a_run(tmp_path: Path) -> None:
    assert resume_point(tmp_path, None) is None
    assert resume_point(tmp_path, "auto") is None
    old, new = saved(tmp_path, 3), saved(tmp_path, 4)
    (tmp_path / ".checkpoint-5.tmp").mkdir()  # a save killed on the way
    assert resume_point(tmp_path, "auto") == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert resume_point(tmp_path, str(new)) == new
    assert resume_point(tmp_path / "another run", str(old)) == old
    with pytest.raises(ValueError, match=r"went on after checkpoint-3 \(checkpoint-4\)"):
        resume_point(tmp_path, str(old))
    with pytest.raises(ValueError, match="'auto' or an existing checkpoint-N directory"):
        resume_point(tmp_path, "latest")


@pytest.mark.parametrize("call", range(1, 12))
def test_a_full_disk_at_any_write_leaves_the_earlier_checkpoint_and_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    saved(tmp_path, 1)
    remaining = call

    def failing(function: object) -> object:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)  # type: ignore[operator]

        return wrapped

    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    monkeypatch.setattr(Path, "write_bytes", failing(Path.write_bytes))
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    if call <= 9:  # two tensor files, state, manifest; four files and their directory
        with pytest.raises(OSError, match="No space left"):
            saved(tmp_path, 2)
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
        saved(tmp_path, 2)
    else:
        if call == 10:  # the parent's own fsync: the checkpoint is there, only its durability is unknown
            with pytest.raises(OSError, match="No space left"):
                saved(tmp_path, 2)
        else:
            saved(tmp_path, 2)
        monkeypatch.undo()
    load_checkpoint(tmp_path / "checkpoint-2")


# Imports torch once; for each line it reads, forks a process that only saves, and says its number and when it died.
SAVER = """
import os, sys, torch
from pathlib import Path
from fastrl.train.checkpoint import newest_checkpoint, save_checkpoint

def save_for_ever(run):
    last = newest_checkpoint(run)
    step = 1 + (int(last.name.split("-")[1]) if last else 0)
    while True:
        tensors = {group: {"w": torch.full((50_000,), float(step))} for group in ("a", "b", "c")}
        save_checkpoint(run, step, tensors=tensors, state={"step": step}, keep=2)
        step += 1

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        save_for_ever(Path(sys.argv[1]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def kill_during_saves(run: Path, kills: int) -> int:
    """Kill a process that only saves, at a random moment, and check what it left; repeat; returns the last step."""
    chance = random.Random(1)
    newest = 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        for _ in range(kills):
            print("save", file=saver.stdin, flush=True)
            child = int(saver.stdout.readline())
            while not any(int(path.name.split("-")[1]) > newest for path in run.glob("checkpoint-*")):
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert saver.stdout.readline() == "dead\n"
            found = newest_checkpoint(run)  # a damaged one would warn, and warnings are errors
            assert found is not None
            tensors, state = load_checkpoint(found)
            assert found.name == f"checkpoint-{state['step']}"
            assert state["step"] > newest
            for named in tensors.values():
                assert torch.equal(named["w"], torch.full((50_000,), float(state["step"])))
            newest = state["step"]
    return newest


def test_a_run_killed_while_saving_resumes_from_a_whole_checkpoint(tmp_path: Path) -> None:
    assert kill_during_saves(tmp_path, kills=12) >= 12


@pytest.mark.slow
def test_two_hundred_kills_leave_a_whole_checkpoint_each_time(tmp_path: Path) -> None:
    assert kill_during_saves(tmp_path, kills=200) >= 200


def test_files_and_their_directory_are_on_the_disk_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_rename = durable.sync, Path.rename

    def sync(path: Path) -> None:
        events.append(f"sync {path.name}")
        real_sync(path)

    def rename(path: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return real_rename(path, target)

    monkeypatch.setattr(durable, "sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    save_checkpoint(tmp_path / "run", 1, tensors={"a": {"w": torch.ones(1)}}, state={})
    assert sorted(events[:3]) == ["sync a.safetensors", "sync manifest.json", "sync state.json"]
    assert events[3:] == ["sync .checkpoint-1.tmp", "rename checkpoint-1", "sync run"]


def test_the_manifest_is_plain_json_with_sorted_hashes(tmp_path: Path) -> None:
    manifest = json.loads((saved(tmp_path) / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 7)
    assert list(manifest["files"]) == ["optimizer.safetensors", "policy.safetensors", "state.json"]
