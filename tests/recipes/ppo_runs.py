"""Small PPO runs: two rounds of four completions in the default eight steps, on the tiny model of `conftest`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastrl.recipes import ppo
from fastrl.train.config import DataBlock, PPOConfig, ReportBlock
from fastrl.train.export import save_pretrained
from fastrl.train.model import load_tokenizer
from fastrl.train.score_model import load_score_model
from tests.recipes.runs import Base, metrics_of


def ppo_config(base: Base, output_dir: Path, **changes: Any) -> PPOConfig:
    """Rounds of eight completions, learned twice in two mini-batches of four."""
    config = PPOConfig(
        model_name_or_path=str(base.model),
        output_dir=str(output_dir),
        train_dataset=str(base.files.prompts),
        max_steps=8,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=2,
        max_completion_length=6,
        learning_rate=1e-2,
        reward_funcs=("tests.recipes.judges:digit_sum",),
        data=DataBlock(max_rows=20),
        report=ReportBlock(panel=False),
    )
    return replace(config, **changes)


def run_ppo(base: Base, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """A run that must end well, and its log."""
    assert ppo.run(ppo_config(base, folder, **changes)) == 0
    return metrics_of(folder)


def make_reward_model(base: Base, folder: Path) -> Path:
    """The base with a random scalar head: a reward that depends on every token."""
    model = load_score_model(base.model, dtype=torch.float32, device="cpu", new_head=1.0, seed=5)
    return save_pretrained(model, load_tokenizer(base.model, chat_template=None), folder, card="random")
