"""What is wrong with a PPO configuration is one line that names the option, before torch is imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.train.config import OverlongBlock, PackingBlock, PPOConfig
from fastrl.train.validate import problems

GOOD = PPOConfig(
    model_name_or_path="tiny:warm",
    train_dataset="tiny:prompts",
    output_dir="runs/ppo",
    reward_funcs=("exact_match",),
)


def test_the_defaults_and_the_modes_have_no_problem() -> None:
    assert problems(GOOD) == []
    model = replace(GOOD, reward_funcs=(), reward_model_path="tiny:reward_model", value_model_path="tiny:reward_model")
    assert problems(model) == []
    assert problems(replace(GOOD, share_backbone=True, use_peft=True, cliprange_value=None)) == []
    assert problems(replace(GOOD, pretrain_dataset="tiny:sft", ptx_coef=1.0, pretrain_batch_size=4)) == []
    assert problems(replace(GOOD, adaptive_kl_target=0.1, adaptive_kl_horizon=100, target_kl=0.1)) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"reward_funcs": ()}, "reward_model_path: nothing judges"),
        ({"reward_funcs": ("exact_mach",)}, "reward_funcs: "),
        ({"reward_weights": (1.0, 2.0)}, "reward_weights: needs one number for each of the 1"),
        ({"reward_model_weight": 0.5}, "reward_model_weight: has no effect"),
        ({"reward_model_path": "nowhere"}, "reward_model_path: nowhere is no model directory"),
        ({"sft_model_path": "tiny:rewrd_model"}, "sft_model_path: tiny:rewrd_model is not known"),
        ({"sft_model_path": "tiny:base", "kl_coef": 0.0}, "sft_model_path: the reference is not needed"),
        ({"sft_model_path": "tiny:base", "use_peft": True}, "sft_model_path: with use_peft"),
        ({"value_model_path": "tiny:reward_model", "use_peft": True}, "value_model_path: with use_peft"),
        ({"value_model_path": "tiny:reward_model", "share_backbone": True}, "value_model_path: with share_backbone"),
        ({"value_learning_rate": 1e-4, "share_backbone": True}, "value_learning_rate: with share_backbone"),
        ({"num_generations": 3}, "num_generations: a round"),
        ({"target_kl": 0.1, "num_ppo_epochs": 1}, "target_kl: can stop nothing"),
        ({"temperature": 0.0}, "temperature: 0 is greedy"),
        ({"stop": ("",)}, "stop: an empty text"),
        ({"overlong": OverlongBlock(buffer=300)}, "overlong.buffer: 300"),
        ({"overlong": OverlongBlock(penalty=2.0)}, "overlong.penalty: has no effect"),
        ({"packing": PackingBlock(token_budget=100)}, "packing.token_budget: 100 cannot hold one sequence"),
        ({"adaptive_kl_horizon": 5}, "adaptive_kl_horizon: has no effect"),
        ({"adaptive_kl_target": 0.1, "kl_coef": 0.0}, "adaptive_kl_target: steers kl_coef"),
        ({"kl_estimator": "k3", "kl_coef": 0.0}, "kl_estimator: has no effect"),
        ({"ptx_coef": 1.0}, "ptx_coef: has no effect"),
        ({"pretrain_dataset": "tiny:sft"}, "pretrain_dataset: has no effect"),
        ({"pretrain_batch_size": 4}, "pretrain_batch_size: has no effect"),
        ({"lam": 1.5}, "lam: must be in [0, 1]"),
        ({"cliprange_value": 0.0}, "cliprange_value: must be in (0, inf)"),
    ],
    ids=str,
)
def test_each_mistake_is_one_line(changes: dict[str, Any], problem: str) -> None:
    (found,) = problems(replace(GOOD, **changes))
    assert found.startswith(problem)


def test_an_adapter_needs_the_base_that_use_peft_keeps(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    path = str(tmp_path)
    (found,) = problems(replace(GOOD, reward_model_path=path))
    assert found.startswith(f"reward_model_path: {path} is an adapter, which needs the base that use_peft keeps")
    assert problems(replace(GOOD, reward_model_path=path, value_model_path=path, use_peft=True)) == []
