"""The names under which weights are pushed are those of the model's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastrl.rollout.vllm_weights import named_weights
from tests.rollout.contract import MakeModel
from tests.rollout.tiny import gemma2_softcap, llama_eager, qwen3


@pytest.mark.parametrize("make_model", [qwen3, llama_eager, gemma2_softcap], ids=lambda f: f.__name__)
def test_names_and_values_are_those_of_the_files(make_model: MakeModel, tmp_path: Path) -> None:
    """A tied head has one name, an untied one its own."""
    model = make_model()
    model.save_pretrained(tmp_path)
    saved, found = load_file(tmp_path / "model.safetensors"), named_weights(model)
    assert found.keys() == saved.keys()
    assert all(found[name].equal(saved[name]) for name in saved)
