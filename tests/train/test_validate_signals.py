from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.report.signals import DETECTORS
from fastrl.train.algorithm import PRESETS
from fastrl.train.config import DynamicSamplingBlock, GRPOConfig, OverlongBlock, PPOConfig, SignalsBlock
from fastrl.train.validate_signals import (
    NORMALISES_GROUPS,
    SETTINGS,
    aggregation_problems,
    composition_problems,
    signal_problems,
)

BASE = GRPOConfig(model_name_or_path="m", output_dir="o", train_dataset="d", reward_funcs=("exact_match", "format"))


def acting(**actions: str) -> GRPOConfig:
    return replace(BASE, signals=SignalsBlock(actions=actions))


def test_every_field_of_the_block_is_a_setting_or_a_detector() -> None:
    assert set(vars(SignalsBlock())) == {*SETTINGS, *DETECTORS}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reward_gates": {"exact_match": "fromat"}}, "reward_gates: there is no reward fromat"),
        ({"reward_gates": {"format": ""}}, "must name another reward"),
        ({"reward_schedule": {"format": "soon"}}, "reward_schedule: format: a schedule is"),
        ({"reward_schedule": {"numeric": "0: 1"}}, "reward_schedule: there is no reward numeric"),
    ],
)
def test_gates_and_schedules_are_read_before_anything_is_loaded(changes: dict[str, Any], reason: str) -> None:
    (problem,) = composition_problems(replace(BASE, **changes))
    assert reason in problem


def test_good_compositions_have_no_problem() -> None:
    good = replace(BASE, reward_gates={"exact_match": "format > 0.5"}, reward_schedule={"format": "0: 1, 9: 0"})
    assert list(composition_problems(good)) == []
    mine = replace(BASE, reward_funcs=("mine.py:accuracy", "format"), reward_gates={"accuracy": "format"})
    assert list(composition_problems(mine)) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (acting(kl_blowpu="stop"), "no detector kl_blowpu; did you mean kl_blowup"),
        (acting(clip_tail="explode"), "clip_tail must be one of warn, lower_lr, raise_kl, rollback, stop, got explode"),
        (acting(clip_tail="raise_kl"), "cannot raise the KL, its coefficient is 0"),
        (acting(reward_hacking="stop"), "reward_hacking reads evaluations"),
        (replace(BASE, signals=SignalsBlock(kl_blowup=None, actions={"kl_blowup": "stop"})), "kl_blowup is turned off"),
    ],
)
def test_actions_that_cannot_be_taken_are_refused(config: GRPOConfig, reason: str) -> None:
    (problem,) = signal_problems(config)
    assert reason in problem


def test_actions_that_can_be_taken_are_not() -> None:
    assert list(signal_problems(replace(acting(kl_blowup="raise_kl"), beta=0.1))) == []
    ppo = PPOConfig(model_name_or_path="m", output_dir="o", train_dataset="d")
    assert list(signal_problems(replace(ppo, signals=SignalsBlock(actions={"clip_tail": "raise_kl"})))) == []


def test_gdpo_has_no_place_for_what_reads_the_sum() -> None:
    gdpo = replace(BASE, multi_objective_aggregation="normalize_then_sum")
    assert list(aggregation_problems(gdpo)) == []
    for changes, reason in (
        ({"algorithm": "dr_grpo"}, "replaces the advantage of dr_grpo"),
        ({"scale_rewards": "batch"}, "remove scale_rewards"),
        ({"overlong": OverlongBlock(buffer=56)}, r"length(start=200, limit=256)"),
        ({"dynamic_sampling": DynamicSamplingBlock(max_rounds=1)}, "remove one of them"),
    ):
        (problem,) = aggregation_problems(replace(gdpo, **changes))  # type: ignore[arg-type]
        assert reason in problem
    described = {name: repr(PRESETS[name]()) for name in NORMALISES_GROUPS}
    assert all("advantage=group_normalized" in text for text in described.values())


def test_the_rules_are_among_those_that_every_run_obeys(tmp_path: Path) -> None:
    from fastrl.train.validate import problems

    found = problems(replace(acting(kl_blowpu="stop"), reward_gates={"exact_match": "fromat"}))
    assert any("no detector" in problem for problem in found)
    assert any("no reward fromat" in problem for problem in found)
