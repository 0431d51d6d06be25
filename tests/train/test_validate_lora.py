"""Rules about LoRA options: each broken one is a line that starts with the option."""

from __future__ import annotations

from typing import Any

import pytest

from fastrl.train import validate_lora
from fastrl.train.config import SFTConfig
from fastrl.train.validate import problems
from fastrl.train.validate_lora import lora_problems


def config(**changes: Any) -> SFTConfig:
    return SFTConfig(model_name_or_path="tiny:warm", output_dir="out", train_dataset="tiny:sft", **changes)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"lora_r": 8}, "lora_r: has no effect"),
        ({"lora_alpha": 8}, "lora_alpha: has no effect"),
        ({"lora_target_modules": ("q_proj",)}, "lora_target_modules: has no effect"),
        ({"load_in_4bit": True}, "load_in_4bit: weights in 4 bits cannot be trained"),
        ({"use_peft": True, "lora_target_modules": ()}, "lora_target_modules: is empty"),
        ({"use_peft": True, "lora_r": 0}, "lora_r: must be in"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "label_smoothing: has no place in loss_type dft"),
    ],
)
def test_an_option_without_effect_is_one_line(changes: dict[str, Any], start: str) -> None:
    (problem,) = problems(config(**changes))
    assert problem.startswith(start)


def test_what_works_is_no_problem() -> None:
    for changes in ({}, {"use_peft": True}, {"use_peft": True, "lora_r": 4, "lora_target_modules": ("q_proj",)}):
        assert problems(config(**changes)) == []


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_lora, "find_spec", lambda name: None)
    assert [line.partition(";")[2] for line in lora_problems(config(use_peft=True, load_in_4bit=True))] == [
        " pip install peft",
        " pip install bitsandbytes",
    ]
