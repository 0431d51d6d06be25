"""A recipe's engine is closed however the recipe ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import grpo
from fastrl.rollout.builtin import BuiltinEngine
from fastrl.train import engine
from fastrl.train.config import RolloutBlock
from tests.recipes.conftest import base as base  # the fixture
from tests.recipes.runs import Base, grpo_config


class Closing(BuiltinEngine):
    """The built-in engine with something to close."""

    open = 0

    def close(self) -> None:
        type(self).open -= 1


@pytest.fixture(autouse=True)
def _instead_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(config: Any, policy: Any, tokenizer: Any) -> Closing:
        Closing.open += 1
        return Closing(policy, tokenizer)

    monkeypatch.setattr(engine, "vllm_engine", opened)
    monkeypatch.setattr(Closing, "open", 0)


def test_a_run_and_a_dry_run_close_what_they_opened(base: Base, tmp_path: Path) -> None:
    config = grpo_config(base, tmp_path / "run", rollout=RolloutBlock(engine="vllm"), max_steps=1)
    assert grpo.run(config) == 0
    assert Closing.open == 0
    assert grpo.dry_run(config) == 0
    assert Closing.open == 0


def test_a_run_that_fails_in_the_middle_closes_it(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def failing(self: Any, *_: Any, **__: Any) -> None:
        seen.append(Closing.open)
        raise RuntimeError("the sampler is gone")

    monkeypatch.setattr(Closing, "generate", failing)
    with pytest.raises(RuntimeError, match="the sampler is gone"):
        grpo.run(grpo_config(base, tmp_path / "run", rollout=RolloutBlock(engine="vllm")))
    assert seen == [1]
    assert Closing.open == 0
