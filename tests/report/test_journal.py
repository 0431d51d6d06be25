"""One owner of a run's files: what it writes, cuts back, and leaves when a run ends early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrl.report import CompletionSample, Panel, read_completions, read_log
from fastrl.report import journal as journal_module
from fastrl.report.journal import Journal
from fastrl.rewards import RewardError


def journal(folder: Path, **options: Any) -> Journal:
    return Journal(folder, title="run", total_steps=3, live=False, config={"seed": 1}, **options)


def test_a_step_goes_to_every_file_and_the_report_follows(tmp_path: Path) -> None:
    with journal(tmp_path) as log:
        log.write(1, {"loss": 0.5}, [CompletionSample("2+2?", "4")])
        log.write_errors(1, {"judge": RewardError(2, "Traceback: 503")})
        log.write_errors(2, {})
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path / "metrics.jsonl")] == [(1, 0.5)]
    assert read_completions(tmp_path / "completions.jsonl")[0][1].completion == "4"
    errors = read_log(tmp_path / "errors.jsonl")
    assert errors == [{"step": 1, "reward": "judge", "count": 2, "message": "Traceback: 503"}]
    page = (tmp_path / "report.html").read_text()
    assert "2+2?" in page
    assert "Traceback: 503" in page


def test_what_came_after_the_offsets_is_forgotten_in_every_file(tmp_path: Path) -> None:
    with journal(tmp_path) as log:
        log.write(1, {"loss": 0.5}, [CompletionSample("a", "b")])
        log.write_errors(1, {"judge": RewardError(1, "first")})
        offsets = log.offsets()
        log.write(2, {"loss": 0.4}, [CompletionSample("c", "d")])
        log.write_errors(2, {"judge": RewardError(1, "second")})
    files = ("metrics.jsonl", "completions.jsonl", "errors.jsonl")
    with journal(tmp_path) as log:
        log.truncate_to(offsets)
        assert [len(read_log(tmp_path / name)) for name in files] == [1, 1, 1]
        assert log.offsets() == offsets
        log.truncate_to({})  # no checkpoint: the run starts anew
        assert [len(read_log(tmp_path / name)) for name in files] == [0, 0, 0]


def test_a_run_that_ends_before_its_first_step_raises_its_own_error_and_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), journal(tmp_path):
        raise KeyError("mine")
    assert not (tmp_path / "report.html").exists()


def test_trackers_get_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def opened(name: str, run_dir: Path, config: Any) -> Any:
        seen.append((name, run_dir, config))
        return lambda step, metrics: seen.append((step, dict(metrics)))

    monkeypatch.setattr(journal_module, "open_tracker", opened)
    with journal(tmp_path, trackers=("wandb",)) as log:
        log.write(7, {"loss": 0.5})
    assert seen == [("wandb", tmp_path, {"seed": 1}), (7, {"loss": 0.5})]


def test_the_panel_is_told_whether_it_may_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def spy(*args: Any, **options: Any) -> Panel:
        asked.append(options["live"])
        return Panel(*args, **options)

    monkeypatch.setattr(journal_module, "Panel", spy)
    for live in (True, False):
        Journal(tmp_path, title="run", total_steps=1, live=live, config={}).close()
    assert asked == [True, False]
