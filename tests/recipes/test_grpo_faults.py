"""What goes wrong in a GRPO run: numbers, rewards, rows and sizes; nothing of it trains, and nothing of it is lost."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import grpo
from fastrl.report import read_log
from fastrl.train import update as update_module
from fastrl.train.config import DataBlock, DynamicSamplingBlock, PackingBlock, RewardsBlock, RolloutBlock
from fastrl.train.guards import NonFiniteError, NoVerdictError
from fastrl.train.reward_workers import RewardErrorRateError
from fastrl.types import LossOutput
from tests.recipes.runs import Base, column, grpo_config, metrics_of, run_grpo

JUDGE = "tests.recipes.judges"


def with_nan_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original, calls = update_module.policy_loss, []

    def poisoned(*args: Any, **options: Any) -> LossOutput:
        calls.append(1)
        output = original(*args, **options)
        return LossOutput(output.loss * math.nan, output.metrics) if len(calls) == number else output

    monkeypatch.setattr(update_module, "policy_loss", poisoned)


def test_a_loss_that_is_not_finite_is_skipped_and_moves_no_coefficient(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nan_in_step(monkeypatch, 2)
    lines = run_grpo(base, tmp_path / "run", on_nonfinite="skip", beta=0.5, adaptive_kl_target=10.0)
    assert column(lines, "skipped_step") == [0.0, 1.0, 0.0, 0.0]
    assert [line["loss"] is None for line in lines] == [False, True, False, False]
    coefficients = column(lines, "kl_coef")
    assert coefficients[0] == coefficients[1] > coefficients[2] > coefficients[3]


def test_a_loss_that_is_not_finite_halts_and_the_log_tells_how_far_it_came(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nan_in_step(monkeypatch, 2)
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan"):
        grpo.run(grpo_config(base, tmp_path / "run"))
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_error_in_the_first_step_is_the_one_that_is_raised(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nan_in_step(monkeypatch, 1)
    with pytest.raises(NonFiniteError):
        grpo.run(grpo_config(base, tmp_path / "run"))


def test_steps_whose_groups_all_lack_signal_are_skipped_and_the_run_goes_on(base: Base, tmp_path: Path) -> None:
    changes = {"reward_funcs": (f"{JUDGE}:nothing",), "dynamic_sampling": DynamicSamplingBlock(max_rounds=1)}
    lines = run_grpo(base, tmp_path / "run", steps_per_generation=2, **changes)
    assert column(lines, "dynamic_sampling/waste") == column(lines, "skipped_step") == [1.0] * 4
    assert column(lines, "epoch") == [0.8, 1.6, 2.4, 3.2]  # 4 groups, and 4 more, of 10 prompts
    assert not any(line.get("nonfinite") for line in lines)


def test_failures_of_a_reward_are_counted_every_step_and_never_a_zero(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", reward_funcs=(f"{JUDGE}:broken",), logging_steps=2, max_steps=2)
    assert column(lines, "reward") == column(lines, "rewards/broken/mean") == []
    assert column(lines, "sampling/error_rate") == column(lines, "rewards/broken/error_rate") == [1.0] * 2
    errors = read_log(tmp_path / "run" / "errors.jsonl")
    assert [(error["step"], error["count"]) for error in errors] == [(1, 8), (2, 8)]
    assert "no such answer" in errors[0]["message"]
    assert "no such answer" in (tmp_path / "run" / "report.html").read_text()


def test_truncated_completions_leave_the_loss_when_asked(base: Base, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_completion_length": 1, "max_steps": 1}  # all but one in fifteen are cut
    masked = run_grpo(base, tmp_path / "masked", mask_truncated_completions=True, **changes)
    assert masked[0]["completions/clipped_ratio"] >= 0.5
    assert masked[0]["trained_sequences"] <= 1 - masked[0]["completions/clipped_ratio"]
    assert run_grpo(base, tmp_path / "plain", **changes)[0]["trained_sequences"] > masked[0]["trained_sequences"]


def test_bad_rows_are_set_aside_once_with_their_reasons(base: Base, tmp_path: Path) -> None:
    good = base.files.prompts.read_text().splitlines()[:6]
    long = json.dumps({"prompt": [{"role": "user", "content": "1" * 30}], "answer": "1"})
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("\n".join([*good[:3], '{"prompt": 3}', long, *good[3:]]) + "\n")
    held_out.write_text("\n".join([*good, "{"]) + "\n")
    changes: dict[str, Any] = {
        "train_dataset": str(train),
        "eval_dataset": str(held_out),
        "data": DataBlock(skip_bad_rows=True),
        "rollout": RolloutBlock(max_prompt_length=20),
    }
    config = grpo_config(base, tmp_path / "run", max_steps=1, **changes)
    assert grpo.run(config) == 0
    assert grpo.run(replace(config, resume_from_checkpoint="auto")) == 0
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [Path(each["place"]).name for each in rejected] == ["train.jsonl:4", "train.jsonl:5", "held_out.jsonl:7"]
    assert "max_prompt_length = 20" in rejected[1]["reasons"][0]
    assert rejected[1]["row"] == long
    strict = replace(config, output_dir=str(tmp_path / "strict"), data=DataBlock())
    with pytest.raises(ValueError, match=r"train\.jsonl:4:/prompt"):
        grpo.run(strict)


def test_sequences_that_will_not_fit_are_refused_before_the_first_step(base: Base, tmp_path: Path) -> None:
    for changes, message in (
        ({"packing": PackingBlock(token_budget=11)}, "may take 13 positions, and packing.token_budget is 11"),
        ({"data": DataBlock(max_rows=4, system_prompt="1" * 60)}, "leaves no room to sample in the model's context"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.run(grpo_config(base, tmp_path / "run", **changes))
    run_grpo(
        base, tmp_path / "run", packing=PackingBlock(token_budget=13), max_steps=1
    )  # the directory was not used up


def test_a_judge_that_is_down_is_shown_at_once_and_stops_the_run_at_the_third_round(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NoVerdictError, match="reward 'broken' failed on 8 of 8"):
        run_grpo(base, tmp_path / "run", reward_funcs=(f"{JUDGE}:broken",))
    printed = capsys.readouterr().err
    assert printed.count("step 1: reward 'broken' failed on 8 completions") == 1
    assert "no such answer" in printed
    assert not (tmp_path / "run" / "model").exists()


def test_rewards_see_how_far_the_run_is(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", reward_funcs=(f"{JUDGE}:step_number",), max_steps=3)
    assert column(lines, "rewards/step_number/mean") == [0.0, 1.0, 2.0]


def test_a_reward_that_hangs_and_crashes_costs_its_completions_and_stops_the_run_above_a_rate(
    base: Base, tmp_path: Path
) -> None:
    reward = (f"{JUDGE}:hangs_and_crashes",)
    lenient = RewardsBlock(timeout_seconds=0.3, max_error_rate=1.0)
    lines = run_grpo(base, tmp_path / "lenient", reward_funcs=reward, rewards=lenient)
    rates = column(lines, "rewards/hangs_and_crashes/error_rate")
    assert len(rates) == 4
    assert all(0 < rate < 1 for rate in rates)
    assert column(lines, "sampling/error_rate") == rates
    errors = [error["message"] for error in read_log(tmp_path / "lenient" / "errors.jsonl")]
    assert any("took longer than 0.3 seconds" in message or "killed by SIGKILL" in message for message in errors)
    strict = replace(lenient, max_error_rate=0.02)
    with pytest.raises(RewardErrorRateError, match=r"reward 'hangs_and_crashes' failed on .* in 3 steps in a row"):
        run_grpo(base, tmp_path / "strict", reward_funcs=reward, rewards=strict)
    assert [line["step"] for line in metrics_of(tmp_path / "strict")] == [1, 2, 3]
