"""PPO learns what GRPO learns: the demo's task, the same prompts, completions, steps and rate."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from fastrl.recipes import grpo, ppo, tiny
from fastrl.train.config import GRPOConfig, PackingBlock, PPOConfig, ReportBlock
from tests.recipes.runs import column, metrics_of

STEPS, COMPLETIONS, GENERATIONS = 100, 512, 8


def common(output_dir: Path, seed: int) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny.made("warm")),
        "train_dataset": str(tiny.made("prompts")),
        "output_dir": str(output_dir),
        "seed": seed,
        "reward_funcs": ("exact_match",),
        "num_generations": GENERATIONS,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "per_device_train_batch_size": COMPLETIONS,
        "learning_rate": 5e-4,
        "warmup_steps": 5,
        "adam_beta2": 0.99,
        "logging_steps": STEPS,
        "packing": PackingBlock(token_budget=16384),
        "report": ReportBlock(panel=False),
    }


def reached(folder: Path) -> tuple[float, float]:
    """Mean reward of the first round and of the last ten."""
    rewards = column(metrics_of(folder), "reward")
    return rewards[0], mean(rewards[-10:])


@pytest.mark.slow
def test_ppo_and_grpo_reach_the_same_reward_on_the_demo_task(tmp_path: Path) -> None:
    found: dict[str, list[float]] = {"grpo": [], "ppo": []}
    for seed in range(5):
        assert grpo.run(GRPOConfig(**common(tmp_path / f"grpo{seed}", seed))) == 0
        options: dict[str, Any] = {"num_ppo_epochs": 1, "kl_coef": 0.0, "lam": 1.0, "value_learning_rate": 1e-3}
        assert ppo.run(PPOConfig(**common(tmp_path / f"ppo{seed}", seed), **options)) == 0
        for name, rewards in found.items():
            first, last = reached(tmp_path / f"{name}{seed}")
            assert last > first + 0.05, (name, seed)
            rewards.append(last)
    middle = {name: median(rewards) for name, rewards in found.items()}
    assert abs(middle["ppo"] - middle["grpo"]) <= 0.1 * middle["grpo"], found
