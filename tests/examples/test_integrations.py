"""The examples of hosts do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "integrations"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_the_trainer_sees_the_same_losses() -> None:
    assert main_of("transformers_trainer") < 1e-5


def test_dpo_under_ligers_name_learns_the_preference() -> None:
    first, last = main_of("liger_dpo")
    assert first == pytest.approx(0.6931, abs=1e-3)
    assert last < 0.6


def test_the_heads_of_verl_and_prime_rl_give_the_numbers_of_logits() -> None:
    assert main_of("verl_head") < 1e-5
