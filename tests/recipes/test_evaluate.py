"""Evaluation: what it prints, writes and refuses to invent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import evaluate
from fastrl.report import read_completions
from fastrl.train.config import DataBlock, EvalConfig, RewardsBlock
from tests.recipes.runs import Base

JUDGE = "tests.recipes.judges"


def config(base: Base, **changes: Any) -> EvalConfig:
    options: dict[str, Any] = {
        "model_name_or_path": str(base.model),
        "eval_dataset": str(base.files.held_out),
        "reward_funcs": (f"{JUDGE}:digit_sum",),
        "max_completion_length": 6,
        **changes,
    }
    return EvalConfig(**options)


def test_the_mean_is_over_prompts_and_goes_to_the_screen_and_the_directory(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = config(base, num_generations=3, temperature=1.0, output_dir=str(tmp_path / "out"))
    assert evaluate.run(chosen) == 0
    samples = read_completions(tmp_path / "out" / "completions.jsonl")
    assert len(samples) == 12 * 3
    values = [sample.rewards["digit_sum"] for _, sample in samples]
    record = json.loads((tmp_path / "out" / "eval.json").read_text())["digit_sum"]
    assert record["n"] == 12
    assert record["mean"] == pytest.approx(sum(value for value in values if value is not None) / 36)
    assert 0 < record["standard_error"] < 0.2
    printed = capsys.readouterr().out
    assert printed == f"digit_sum: {100 * record['mean']:.1f} % +- {100 * record['standard_error']:.1f} (n=12)\n"


def test_the_same_seed_gives_the_same_samples_and_greedy_needs_none(base: Base) -> None:
    def completions(**changes: Any) -> list[Any]:
        return evaluate.judge(config(base, **changes))[0].completions

    assert completions(temperature=1.0, seed=3) == completions(temperature=1.0, seed=3)
    assert completions(temperature=1.0, seed=3) != completions(temperature=1.0, seed=4)
    assert completions(seed=3) == completions(seed=4) == completions(temperature=1.0, top_k=1)


def test_every_reward_has_its_own_line_and_nothing_is_written_without_a_directory(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.run(config(base, reward_funcs=(f"{JUDGE}:digit_sum", f"{JUDGE}:is_long"))) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["digit_sum", "is_long"]
    assert list(tmp_path.iterdir()) == []


def test_completions_without_a_verdict_are_left_out_and_a_failing_reward_is_shown(
    base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = config(base, reward_funcs=(f"{JUDGE}:no_verdict_on_the_first_of_four",), data=DataBlock(max_rows=8))
    assert evaluate.run(chosen) == 1
    assert "failed on more completions than rewards.max_error_rate allows" in capsys.readouterr().err
    assert evaluate.run(replace(chosen, rewards=RewardsBlock(max_error_rate=0.125))) == 0
    printed = capsys.readouterr()
    assert "(n=5)" in printed.out  # of 8: two None, one NaN
    assert "no_verdict_on_the_first_of_four failed on 1 completions" in printed.err


def test_a_reward_without_a_verdict_says_so_and_hides_no_other(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    lenient = RewardsBlock(max_error_rate=1.0)
    assert evaluate.run(config(base, reward_funcs=(f"{JUDGE}:broken", f"{JUDGE}:is_long"), rewards=lenient)) == 0
    printed = capsys.readouterr()
    assert "broken: no verdict on any completion" in printed.out
    assert "is_long: " in printed.out
    assert "KeyError: 'no such answer'" in printed.err
    assert evaluate.run(config(base, reward_funcs=(f"{JUDGE}:broken",))) == 1
