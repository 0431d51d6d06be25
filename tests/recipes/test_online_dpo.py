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
from fastrl.types import Rollout
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


def test_the_best_meets_the_worst_and_ties_and_missing_verdicts_make_no_pair() -> None:
    rollouts = [Rollout((1, 2), (i,), (-0.5,), "stop", 0) for i in range(10)]
    nan = math.nan
    reward = torch.tensor([1.0, 3.0, 3.0, 0.5, 2.0, 2.0, nan, nan, 4.0, nan])
    group = torch.tensor([7, 7, 7, 7, 2, 2, 2, 5, 5, 5])
    paired = online_dpo.best_and_worst(rollouts, reward, group)
    assert [(pair.chosen.ids, pair.rejected.ids) for pair in paired.pairs] == [((1, 2, 1), (1, 2, 3))]
    assert paired.pairs[0].chosen.is_trained == (False, False, True)
    assert (paired.margins, paired.n_tied, paired.n_unjudged) == ([2.5], 1, 1)


def test_tokens_the_policy_did_not_choose_are_not_trained() -> None:
    rollout = Rollout((1,), (2, 3, 4), (-1.0, 0.0, -1.0), "stop", 0, is_sampled=(True, False, True))
    other = Rollout((1,), (5,), (-1.0,), "stop", 0)
    (pair,) = online_dpo.best_and_worst([other, rollout], torch.tensor([0.0, 1.0]), torch.tensor([0, 0])).pairs
    assert pair.chosen.is_trained == (False, True, False, True)


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
