"""Stages in a row: each from what earlier ones made, none done twice, and a stop anywhere costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.cli import configure
from fastrl.recipes import generate, pipeline
from fastrl.train import fit
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.run_directory import RunDirectoryError
from tests.recipes.runs import Base, PowerCutError, after_call, cut_power, send_sigterm, weights_of

SHORT = "max_steps: 2\n    per_device_train_batch_size: 4\n    report: {panel: false}\n    save_steps: 1"


def written(base: Base, folder: Path, *, rl_seed: int = 1, output: str = "run") -> Path:
    """SFT, sampling with it, and SFT on the samples."""
    path = folder / "pipeline.yaml"
    path.write_text(
        f"""recipe: pipeline
output_dir: {folder / output}
stages:
  warm:
    recipe: sft
    model_name_or_path: {base.model}
    train_dataset: {base.files.sft}
    {SHORT}
  samples:
    recipe: generate
    model_name_or_path: ${{warm}}/model
    prompt_file: {base.files.prompts}
    num_generations: 2
    max_completion_length: 6
    temperature: 2.0
    verify: ["length(limit=6)"]
    verify_threshold: -9.0
    data: {{max_rows: 60}}
    seed: {rl_seed}
  again:
    recipe: sft
    model_name_or_path: ${{warm}}/model
    train_dataset: ${{samples}}/data.jsonl
    {SHORT}
"""
    )
    return path


def run(path: Path) -> int:
    return pipeline.run(configure("pipeline", str(path), []))


def runs_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages whose recipe is called from now on."""
    taken: list[str] = []
    honest = pipeline._take

    def recorded(stage: Any, *rest: Any) -> int:
        taken.append(stage.name)
        return honest(stage, *rest)

    monkeypatch.setattr(pipeline, "_take", recorded)
    return taken


def test_what_is_done_and_unchanged_is_skipped_and_what_depends_on_a_change_is_not(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = runs_of(monkeypatch)
    assert run(written(base, tmp_path)) == 0
    assert taken == ["warm", "samples", "again"]
    first = weights_of(tmp_path / "run" / "again")
    assert run(written(base, tmp_path)) == 0
    assert taken == ["warm", "samples", "again"]
    assert "stage 2/3 samples (generate): unchanged, skipped" in capsys.readouterr().out

    assert run(written(base, tmp_path, rl_seed=2)) == 0
    assert taken[3:] == ["samples", "again"]
    assert (tmp_path / "run" / "samples.old-1" / "data.jsonl").is_file()
    kept = weights_of(tmp_path / "run" / "again.old-1")
    assert all((kept[name] == first[name]).all() for name in first)
    ledger = json.loads((tmp_path / "run" / "pipeline.json").read_text())
    assert [ledger[name]["is_done"] for name in ("warm", "samples", "again")] == [True] * 3


@pytest.mark.parametrize(
    ("module", "name", "number"), [(fit, "update", 1), (generate, "collect", 1), (fit, "update", 3)]
)
@pytest.mark.parametrize("stop", [send_sigterm, cut_power])
def test_a_stop_in_any_stage_costs_nothing(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, stop: Any
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert run(written(base, tmp_path / "a")) == 0
    path = written(base, tmp_path / "b")
    with monkeypatch.context() as stopping:
        after_call(stopping, module, name, number=number, do=stop)
        if stop is cut_power:
            with pytest.raises(PowerCutError):
                run(path)
        else:
            assert run(path) == EXIT_INTERRUPTED
    assert run(path) == 0
    whole, resumed = (weights_of(tmp_path / each / "run" / "again") for each in "ab")
    assert all((whole[key] == resumed[key]).all() for key in whole)
    assert not list((tmp_path / "b" / "run").glob("*.old-*"))


def test_a_pipeline_stopped_in_a_stage_goes_on_where_it_was_moved(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(written(base, tmp_path, output="whole")) == 0
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=3, do=send_sigterm)
        assert run(written(base, tmp_path, output="here")) == EXIT_INTERRUPTED
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(written(base, tmp_path, output="there")) == 0
    whole, moved = (weights_of(tmp_path / name / "again") for name in ("whole", "there"))
    assert all((whole[key] == moved[key]).all() for key in whole)
    assert not (tmp_path / "there" / "again.old-1").exists()


def test_a_pipeline_holds_its_directory(base: Base, tmp_path: Path) -> None:
    config = configure("pipeline", str(written(base, tmp_path)), [])
    with pipeline.hold_directory(tmp_path / "run"), pytest.raises(RunDirectoryError, match="another run is using"):
        pipeline.run(config)


def test_a_directory_somebody_deleted_is_made_again(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(written(base, tmp_path)) == 0
    (tmp_path / "run" / "samples").rename(tmp_path / "elsewhere")
    taken = runs_of(monkeypatch)
    assert run(written(base, tmp_path)) == 0
    assert taken == ["samples"]  # made alike, so what follows is unchanged
