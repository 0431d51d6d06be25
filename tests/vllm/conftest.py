"""A tiny untrained model that vLLM runs on a CPU, and the sorting task's files."""

from __future__ import annotations

import pytest

from fastrl.recipes.sorting import make_base_model, write_task
from tests.recipes.runs import Base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    make_base_model(folder / "model", seed=0, heads=2)
    return Base(folder / "model", write_task(folder / "data", seed=0, n_sft=40, n_prompts=9988, n_held_out=12))
