"""One tiny untrained model and the sorting task's files, shared by all recipe tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.recipes.sorting import make_tokenizer, write_task
from fastrl.train.export import save_pretrained
from fastrl.train.tiny import make_tiny_qwen3
from tests.recipes.runs import Base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    model = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=16,
        layers=2,
        intermediate_size=32,
        context=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_pretrained(model, tokenizer, folder / "model", card="random")
    return Base(folder / "model", write_task(folder / "data", seed=0, n_sft=40, n_prompts=9988, n_held_out=12))


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a recipe that writes beside its output_dir is seen
