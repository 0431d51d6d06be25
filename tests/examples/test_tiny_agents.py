"""The agents' examples: a step of each by default; as a slow test, a whole run that learns to use its tool."""

from __future__ import annotations

import json
from pathlib import Path
from time import process_time

import pytest

from fastrl.cli import main

FOLDER = Path(__file__).parents[2] / "examples" / "tiny"
AGENTS = ("agent", "agent_search")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def output_of(name: str) -> Path:
    return Path("runs") / f"tiny-{name.replace('_', '-')}"


def success(name: str, stage: str) -> float:
    record = json.loads((output_of(name) / stage / "eval.json").read_text())
    return float(record["exact_match"]["mean"])


@pytest.mark.parametrize("name", AGENTS)
def test_every_stage_of_an_agent_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"max_steps": "1", "warmup_steps": "0", "per_device_train_batch_size": "16", "data.max_rows": "16"}
    flags = [f"--stages.{stage}.{key}={value}" for stage in ("sft", "grpo") for key, value in short.items()]
    flags += [f"--stages.{stage}.data.max_rows=4" for stage in ("before", "after")]
    assert main(["run", str(FOLDER / f"{name}.yaml"), *flags]) == 0
    assert success(name, "before") == success(name, "after") == 0.0
    lines = [json.loads(line) for line in (output_of(name) / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["episodes/turns"] >= 1 for line in lines if "reward" in line] == [True]
    assert "exact_match 0.000" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_learns_to_use_its_tool_in_ten_minutes_of_one_core(name: str) -> None:
    started = process_time()
    assert main(["run", str(FOLDER / f"{name}.yaml")]) == 0
    assert process_time() - started < 600
    assert success(name, "before") < 0.2
    assert success(name, "after") > 0.7
