"""Small runs of the recipes, and what they left behind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.recipes import grpo
from fastrl.recipes.sorting import TaskFiles
from fastrl.report import read_log
from fastrl.train.config import DataBlock, GRPOConfig, ReportBlock, SFTConfig


@dataclass(frozen=True)
class Base:
    model: Path
    files: TaskFiles


def grpo_config(base: Base, output_dir: Path, **changes: Any) -> GRPOConfig:
    """Two prompts a step, four completions each, a large learning rate."""
    config = GRPOConfig(
        model_name_or_path=str(base.model),
        output_dir=str(output_dir),
        train_dataset=str(base.files.prompts),
        max_steps=4,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        reward_funcs=("tests.recipes.judges:digit_sum",),
        data=DataBlock(max_rows=10),
        report=ReportBlock(panel=False),
    )
    return replace(config, **changes)


def sft_config(base: Base, output_dir: Path, **changes: Any) -> SFTConfig:
    config = SFTConfig(
        model_name_or_path=str(base.model),
        output_dir=str(output_dir),
        train_dataset=str(base.files.sft),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report=ReportBlock(panel=False),
    )
    return replace(config, **changes)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder / "metrics.jsonl")


def run_grpo(base: Base, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """A run that must end well, and its log."""
    assert grpo.run(grpo_config(base, folder, **changes)) == 0
    return metrics_of(folder)


def column(lines: list[dict[str, Any]], name: str) -> list[Any]:
    """One metric of every line that has it."""
    return [line[name] for line in lines if name in line]


def learning_curve(folder: Path) -> list[dict[str, Any]]:
    """The log without what the clock and the machine say."""
    return [{name: value for name, value in line.items() if not is_of_the_clock(name)} for line in metrics_of(folder)]


def is_of_the_clock(name: str) -> bool:
    return name.startswith(("time", "memory/")) or name in ("step_time", "tokens_per_second")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(one: Path, other: Path, *, checkpoint: int) -> None:
    """The same curve, samples, errors, model and optimizer state, bit for bit."""
    assert learning_curve(one) == learning_curve(other)
    for name in ("completions.jsonl", "errors.jsonl"):
        assert (one / name).read_text() == (other / name).read_text(), name
    state = f"checkpoint-{checkpoint}/optimizer.safetensors"
    for file in (state, "model/model.safetensors"):
        expected, got = load_file(one / file), load_file(other / file)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected), file


def after_call(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *, number: int, do: Callable[[], object]
) -> None:
    """Call `do` once, after call `number` of a function of a recipe."""
    original, calls = getattr(module, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == number:
            do()
        return result

    monkeypatch.setattr(module, name, counted)


def send_sigterm() -> None:
    signal.raise_signal(signal.SIGTERM)


class PowerCutError(RuntimeError):
    """The process ends here, as far as the run can tell."""


def cut_power() -> None:
    raise PowerCutError
