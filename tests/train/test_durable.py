from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.train.durable import remove_directory, write_directory, write_text


def test_a_failed_write_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_directory(path, lambda fresh: (fresh / "weights").write_text("old") and None)

    def fail(fresh: Path) -> None:
        (fresh / "weights").write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_directory(path, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (path / "weights").read_text() == "old"


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    write_directory(path, lambda fresh: (fresh / "old").touch())
    write_directory(path, lambda fresh: (fresh / "new").touch())
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
    remove_directory(path)
    assert list(path.parent.iterdir()) == []


def test_what_a_killed_write_left_is_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "stale").touch()
    write_directory(tmp_path / "model", lambda fresh: (fresh / "new").touch())
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["new"]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_text(path, "one")
    write_text(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
