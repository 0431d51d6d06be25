"""An unfinished file of rows: one writer at a time, and nothing finished is thrown away."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.train.partial_file import open_partial


def test_two_writers_of_one_file_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with open_partial(path, {"seed": 1}) as first:
        first.write([{"a": "ä"}])
        first.mark(1, {"rows": 1})
        with pytest.raises(ValueError, match="another run is writing"):
            open_partial(path, {"seed": 1})
        first.write([{"a": 2}])
        first.mark(2, {"rows": 2})
        first.finish()
    assert path.read_text() == '{"a": "ä"}\n{"a": 2}\n'
    with pytest.raises(ValueError, match="exists"):
        open_partial(path, {"seed": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_run_goes_on_behind_the_last_mark(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with open_partial(path, {"seed": 1}) as killed:
        killed.write([{"a": 1}])
        killed.mark(1, {"rows": 1})
        killed.write([{"a": "half of a batch"}])
    with open_partial(path, {"seed": 1}) as again:
        assert (again.done, again.counts) == (1, {"rows": 1})
        again.write([{"a": 2}])
        again.mark(2, {"rows": 2})
        again.finish()
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_other_options_may_start_over_only_while_nothing_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with open_partial(path, {"reward": "broken"}) as failed:
        failed.write([{"a": 1}])
    with open_partial(path, {"reward": "mended"}) as mended:
        mended.write([{"a": 2}])
        mended.mark(1, {"rows": 1})
    with pytest.raises(ValueError, match="of a run with other options or data"):
        open_partial(path, {"reward": "broken"})
    with open_partial(path, {"reward": "mended"}) as again:
        again.finish()
    assert path.read_text() == '{"a": 2}\n'
