"""A file of records is written whole, and measuring one case leaves the others' records alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import figures
from bench.records import case, put, read, write


def record(name: str, contender: str, ms: float, **rest: Any) -> dict[str, Any]:
    return {"row": "step", "shape": {"name": name}, "contender": contender, "ms": ms, "threads": 1, **rest}


def test_a_case_measured_again_takes_its_place_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "step.jsonl"
    put(path, [record("a", "ours", 1), record("a", "theirs", 2)])
    put(path, [record("b", "ours", 3)])
    put(path, [record("c", "ours", 4)])
    put(path, [record("b", "theirs", 5), record("b", "ours", 6)])
    found = [(each["shape"]["name"], each["contender"], each["ms"]) for each in read(path)]
    assert found == [("a", "ours", 1), ("a", "theirs", 2), ("b", "theirs", 5), ("b", "ours", 6), ("c", "ours", 4)]


def test_other_numbers_of_threads_other_rows_and_axes_are_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    others = [record("a", "ours", 1), record("a", "ours", 2, threads=2), record("a", "ours", 3, row="other")]
    for each in others:
        put(path, [each])
    put(path, [{"row": "curve", "axis": "a", "contender": "ours", "threads": 1}])
    put(path, [record("a", "ours", 1, dtype="bfloat16")])
    assert len(read(path)) == 5
    assert len({case(each) for each in read(path)}) == 5


def test_a_damaged_file_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    path.write_text('{"row": "step"\n')
    with pytest.raises(ValueError, match=r"step\.jsonl is damaged .*; move it away and measure again"):
        put(path, [record("a", "ours", 1)])
    assert path.read_text() == '{"row": "step"\n'


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.jsonl"
    write(path, [record("a", "ours", 1)])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(path, [record("a", "ours", 2), {"bad": object()}])
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write(path, [record("a", "ours", 2)])
    assert [each["ms"] for each in read(path)] == [1]
    assert read(tmp_path / "absent.jsonl") == []


def test_the_committed_records_have_each_case_in_one_piece() -> None:
    for path in sorted((figures.ROOT / "bench" / "results").glob("*.jsonl")):
        cases = [case(each) for each in map(json.loads, path.read_text().splitlines()) if "row" in each]
        borders = [new for old, new in zip([None, *cases], cases, strict=False) if new != old]
        assert len(borders) == len(set(borders)), path
