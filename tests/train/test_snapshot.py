"""What a run remembers: progress, log lengths, weights and moments; and nothing is saved twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastrl.train.optimizer import MasterAdamW
from fastrl.train.run_directory import RunDirectory, open_run_directory
from fastrl.train.snapshot import Progress, restore, save
from fastrl.train.tiny import make_tiny_qwen3

HALFWAY = Progress(step=3, ordinal=17, num_tokens=1234, kl_coef=0.1 + 0.2)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with open_run_directory(tmp_path / "run", {}, resume=None) as opened:
        yield opened


def stepped(seed: int) -> MasterAdamW:
    model = make_tiny_qwen3(9, hidden_size=8, layers=1, heads=2, kv_heads=1, seed=seed)
    optimizer = MasterAdamW(model)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step(1e-2)
    return optimizer


def test_everything_comes_back_bit_for_bit(directory: RunDirectory) -> None:
    optimizer = stepped(0)
    save(directory, HALFWAY, {"optimizer": optimizer}, {"metrics.jsonl": 99}, keep=None)
    fresh = stepped(1)
    progress, offsets = restore(directory, {"optimizer": fresh}, resume="auto")
    assert progress == HALFWAY
    assert offsets == {"metrics.jsonl": 99}
    expected, got = optimizer.state_dict(), fresh.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_fresh_start_knows_nothing_and_touches_nothing(directory: RunDirectory) -> None:
    optimizer = stepped(0)
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    for resume in (None, "auto"):
        assert restore(directory, {"optimizer": optimizer}, resume=resume) == (Progress(), {})
    assert all(torch.equal(before[name], tensor) for name, tensor in optimizer.state_dict().items())


def test_a_step_is_saved_once_and_only_the_newest_are_kept(directory: RunDirectory) -> None:
    optimizer = stepped(0)
    save(directory, HALFWAY, {"optimizer": optimizer}, {}, keep=2)
    manifest = (directory.path / "checkpoint-3" / "manifest.json").stat().st_mtime_ns
    save(directory, HALFWAY, {"optimizer": optimizer}, {"changed": 1}, keep=2)
    assert (directory.path / "checkpoint-3" / "manifest.json").stat().st_mtime_ns == manifest
    for step in (4, 5):
        save(directory, Progress(step=step), {"optimizer": optimizer}, {}, keep=2)
    assert sorted(path.name for path in directory.path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert restore(directory, {"optimizer": optimizer}, resume=str(directory.path / "checkpoint-5"))[0].step == 5


def test_a_checkpoint_of_other_states_is_refused_by_name(directory: RunDirectory) -> None:
    optimizer = stepped(0)
    save(directory, Progress(step=1), {"optimizer": optimizer}, {}, keep=None)
    with pytest.raises(ValueError, match="holds the state of optimizer, and this run has critic, optimizer"):
        restore(directory, {"optimizer": optimizer, "critic": stepped(1)}, resume="auto")
