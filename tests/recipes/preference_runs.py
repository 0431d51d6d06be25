"""Files of judged completions for the small model, and their log-probabilities one sequence at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastrl.train.config import TrainConfig
from fastrl.train.order import row_at
from fastrl.train.supervised import Example
from tests.recipes.runs import Base

Config = TypeVar("Config", bound=TrainConfig)


def configured(config_type: type[Config], base: Base, data: Path, output_dir: Path, /, **changes: Any) -> Config:
    """Four steps of eight rows at a large learning rate."""
    config = config_type(
        model_name_or_path=str(base.model),
        output_dir=str(output_dir),
        train_dataset=str(data),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
    )
    return replace(config, report=replace(config.report, panel=False), **changes)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_rows(n: int = 24) -> list[dict[str, Any]]:
    """Questions of 1 to 5 digits, answers of 1 to 7; the right one ends with a 7."""
    rows = []
    for i in range(n):
        chosen, rejected = "1234567"[i % 7 :], "98765432"[: 1 + (3 * i) % 7]
        rows.append({"prompt": [turn("user", str(10 + i**3))], "chosen": [turn("assistant", chosen)],
                     "rejected": [turn("assistant", rejected)]})  # fmt: skip
    return rows


def unpaired_rows(n: int = 24) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(pair_rows(n))
    ]


def ranked_rows(n: int = 24) -> list[dict[str, Any]]:
    """Two to four completions with scores, some of them equal."""
    rows = []
    for i, row in enumerate(pair_rows(n)):
        answers = [row["chosen"], row["rejected"], [turn("assistant", "5" * (1 + i % 5))], [turn("assistant", "31")]]
        scores = [2.0, -1.0, 2.0 if i % 2 else 0.5, -1.0][: 2 + i % 3]
        rows.append({"prompt": row["prompt"], "completions": answers[: len(scores)], "scores": scores})
    return rows


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def first_rows(config: TrainConfig, rows: Sequence[Any]) -> list[Any]:
    """The rows of the run's first step."""
    n = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return [rows[row_at(i, n=len(rows), seed=config.seed)] for i in range(n)]


@torch.no_grad()
def token_logprob(model: Any, example: Example) -> list[float]:
    """Log-probability of every token after the first, in float64."""
    logits = model(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
    return [float(logits[i - 1, example.ids[i]]) for i in range(1, len(example.ids))]


def total_logprob(model: Any, example: Example) -> float:
    """Of the trained tokens."""
    each = token_logprob(model, example)
    return sum(value for value, is_trained in zip(each, example.is_trained[1:], strict=True) if is_trained)


def mean_logprob(model: Any, example: Example) -> float:
    return total_logprob(model, example) / sum(example.is_trained)
