"""Pieces are small, checked and joined again; what is missing or damaged is named."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.offline import cut, pack, unpack


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    found = []
    for name in ("alpha", "beta"):
        path = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"{name}/__init__.py", f"NAME = {name!r}\n" + 500 * "# filler\n")
        found.append(path)
    return found


def test_what_was_cut_can_be_imported_after_unpacking(tmp_path: Path, wheels: list[Path]) -> None:
    folder = tmp_path / "pieces"
    pieces = cut(wheels, folder, piece=1000)
    assert len(pieces) > 5
    assert max(piece.stat().st_size for piece in pieces) == 1000
    site = unpack(folder, tmp_path / "site")
    code = "import alpha, beta; print(alpha.NAME, beta.NAME)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["alpha", "beta"]


def test_packing_again_leaves_no_old_piece(tmp_path: Path, wheels: list[Path]) -> None:
    folder = tmp_path / "pieces"
    assert len(cut(wheels, folder, piece=500)) > len(cut(wheels[:1], folder, piece=5000))
    assert len(list(folder.glob("piece-*"))) == len(cut(wheels[:1], folder, piece=5000))


def test_missing_and_damaged_pieces_are_named(tmp_path: Path, wheels: list[Path]) -> None:
    folder = tmp_path / "pieces"
    pieces = cut(wheels, folder, piece=1000)
    pieces[2].write_bytes(pieces[2].read_bytes()[::-1])
    with pytest.raises(ValueError, match="piece-002 is damaged"):
        unpack(folder, tmp_path / "site")
    pieces[2].unlink()
    with pytest.raises(ValueError, match="piece-002 is missing"):
        unpack(folder, tmp_path / "site")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        unpack(tmp_path / "nowhere", tmp_path / "site")
    for damaged in ("{", "[]", '{"pieces": [], "wheels": []}', '{"pieces": [{"name": "piece-000"}], "wheels": []}'):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            unpack(folder, tmp_path / "site")


def test_a_session_without_its_wheels_says_so_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import gpu_session

    monkeypatch.setattr(sys, "argv", ["gpu_session", "--out", str(tmp_path / "out"), "--wheels", str(tmp_path / "no")])
    with pytest.raises(SystemExit, match="2"):
        gpu_session.main()
    assert "no has no manifest.json; make it with" in capsys.readouterr().err


def test_a_package_without_a_wheel_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for nothing\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="No matching distribution found for nothing"):
        pack(tmp_path, python="3.12", packages=("nothing",))
