"""A digest changes with the file, whether it is read whole or sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.train import contents
from fastrl.train.contents import contents_of, digest


def test_small_files_are_hashed_whole(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert digest(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_large_files_are_sampled_and_still_tell_size_head_tail_and_a_retrained_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "WHOLE", 10)
    monkeypatch.setattr(contents, "BLOCK", 4)
    monkeypatch.setattr(contents, "BLOCKS", 5)
    original = bytes(range(100))
    file, found = tmp_path / "a", set()
    retrained = bytes(byte ^ 1 for byte in original)
    for variant in (original, b"\xff" + original[1:], original[:-1] + b"\xff", original + b"\0", retrained):
        file.write_bytes(variant)
        found.add(digest(file))
    assert len(found) == 5


def test_data_weights_and_reward_files_count_and_absent_ones_do_not(tmp_path: Path) -> None:
    for name in ("train.jsonl", "model.safetensors", "config.json", "judge.py"):
        (tmp_path / name).write_text(name)
    found = contents_of(
        data=[str(tmp_path / "train.jsonl"), None],
        model=str(tmp_path),
        rewards=("numeric", f"{tmp_path}/judge.py:grade", f"verl:{tmp_path}/judge.py:grade", "missing.py:f"),
    )
    assert [Path(path).name for path in found] == ["train.jsonl", "config.json", "model.safetensors", "judge.py"]
