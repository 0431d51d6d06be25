"""Online DPO, whole: which completions are paired, what is skipped, and restarts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.recipes import online_dpo
from fastrl.train.config import DataBlock, OnlineDPOConfig
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_tokenizer
from fastrl.train.score_model import load_score_model, save_score_model
from tests.recipes.preference_runs import configured
from tests.recipes.runs import Base, after_call, assert_same_run, column, metrics_of, send_sigterm

JUDGE = "tests.recipes.judges"


def config_of(base: Base, folder: Path, **changes: Any) -> OnlineDPOConfig:
    """Four prompts a step, four completions each."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 6,
        "reward_funcs": (f"{JUDGE}:digit_sum",),
        "data": DataBlock(max_rows=10),
    }
    return configured(OnlineDPOConfig, base, base.files.prompts, folder, **options | changes)


def test_a_run_counts_its_pairs_and_learns_what_is_rewarded(base: Base, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"reward_funcs": (f"{JUDGE}:is_long",), "temperature": 0.9, "max_steps": 12}
    assert online_dpo.run(config_of(base, tmp_path / "run", **changes)) == 0
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for line in lines:
        assert line["pairs"] + line["tied_prompts"] + line["unjudged_prompts"] == 4
    reward = column(lines, "reward")
    assert sum(reward[-3:]) > sum(reward[:3]) + 0.1


def test_a_round_without_a_pair_leaves_the_weights_alone(base: Base, tmp_path: Path) -> None:
    config = config_of(base, tmp_path / "run", reward_funcs=(f"{JUDGE}:is_even",), num_generations=2, max_steps=6,
                       per_device_train_batch_size=2)  # fmt: skip
    assert online_dpo.run(config) == 0
    lines = metrics_of(tmp_path / "run")
    assert {line["skipped_step"] for line in lines} == {0.0, 1.0}
    assert all((line["pairs"] == 0) == (line["skipped_step"] == 1.0) for line in lines)


@pytest.mark.parametrize("variant", [{}, {"use_peft": True, "lora_r": 2}], ids=["full", "lora"])
def test_a_run_stopped_while_sampling_resumes_bit_for_bit(
    base: Base, tmp_path: Path, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"eval_dataset": str(base.files.held_out), "eval_steps": 2, **variant}
    assert online_dpo.run(config_of(base, tmp_path / "whole", **changes)) == 0
    config = config_of(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, online_dpo, "collect_round", number=3, do=send_sigterm)
        assert online_dpo.run(config) == EXIT_INTERRUPTED
    assert online_dpo.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=4)


def test_a_reward_model_judges_alone(base: Base, tmp_path: Path) -> None:
    score = load_score_model(base.model, dtype=torch.float32, device="cpu", new_head=1.0)
    tokenizer = load_tokenizer(base.model, chat_template=None)
    save_score_model(score, tokenizer, tmp_path / "judge", card="random")
    config = config_of(base, tmp_path / "run", reward_funcs=(), reward_model_path=str(tmp_path / "judge"))
    assert online_dpo.run(replace(config, reward_model_weight=2.0, learning_rate=3e-2, max_steps=12)) == 0
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["reward"] == pytest.approx(2.0 * lines[0]["rewards/reward_model/mean"], rel=1e-5)
    assert sum(column(lines, "reward")[-3:]) > sum(column(lines, "reward")[:3])
