"""Adapters on disk: peft reads ours, we read them back, and the merged model says what base and adapter said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastrl.recipes.sorting import make_tokenizer
from fastrl.train.export import save_pretrained
from fastrl.train.lora import active_adapters, adapter, adapter_off, add_lora, is_of_adapter
from fastrl.train.lora_files import adapter_head, load_adapter, merged_state, save_adapter
from fastrl.train.model import load_model
from fastrl.train.score_model import load_score_model, save_score_model
from fastrl.train.tiny import make_tiny_qwen3
from tests.train.test_lora import logits, randomize

TOKENIZER = make_tokenizer()


def saved_base(folder: Path, *, tie_embeddings: bool = True) -> Path:
    model = make_tiny_qwen3(len(TOKENIZER), hidden_size=16, layers=2, context=64, tie_embeddings=tie_embeddings)
    return save_pretrained(model, TOKENIZER, folder / "base", card="random")


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(path, dtype=dtype, device="cpu")


def trained(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = loaded(path, dtype)
    add_lora(model, r=3, alpha=6, seed=0)
    randomize(model)
    return model


def says(model: Any) -> Tensor:
    return logits(model)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_exported_model_needs_no_peft_and_says_what_base_and_adapter_said(
    tmp_path: Path, tie_embeddings: bool, dtype: torch.dtype, tolerance: float
) -> None:
    base = saved_base(tmp_path, tie_embeddings=tie_embeddings)
    model = trained(base, dtype)
    expected = says(model)
    with adapter_off(model):
        assert (says(model) - expected).norm() > 0.1 * expected.norm()
    written = save_pretrained(model, TOKENIZER, tmp_path / "run" / "model", card="merged")
    assert torch.equal(says(model), expected)
    plain, report = AutoModelForCausalLM.from_pretrained(written, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (says(plain) - expected).norm() <= tolerance * expected.norm()
    assert load_file(written / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert json.loads((written / "config.json").read_text()) == json.loads((base / "config.json").read_text()) | {
        "dtype": str(dtype).removeprefix("torch.")
    }
    assert (written / "tokenizer.json").is_file()
    again = loaded(written, dtype)  # the next stage's start
    assert (says(again) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_peft_reads_the_adapter_that_export_leaves_beside_the_model(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = trained(base)
    save_pretrained(model, TOKENIZER, tmp_path / "run" / "model", card="merged")
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(says(wrapped), says(model), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, str(base))


def test_an_adapter_read_back_is_the_same_bit_for_bit_and_frozen_beside_another(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = trained(base)
    save_adapter(model, tmp_path / "adapter")
    other = loaded(base)
    alone = says(other)
    add_lora(other, r=2, alpha=4, seed=1, target_modules=("q_proj",))
    load_adapter(other, tmp_path / "adapter", name="reward")
    assert active_adapters(other) == ("default",)
    assert torch.equal(says(other), alone)
    with adapter(other, "reward"):
        assert torch.equal(says(other), says(model))
    for key, parameter in other.named_parameters():
        assert parameter.requires_grad == is_of_adapter(key), key
    load_adapter(other, tmp_path / "adapter", name="again", is_trainable=True)
    assert all(parameter.requires_grad for key, parameter in other.named_parameters() if is_of_adapter(key, "again"))


def test_merging_leaves_the_model_alone_and_adds_the_active_adapters_only(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = trained(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merged_state(model)
    with adapter_off(model):
        unmerged = merged_state(model)
    untouched = load_file(base / "model.safetensors")
    for key, value in untouched.items():
        assert torch.equal(unmerged[key], value), key
        assert torch.equal(merged[key], value) == ("_proj" not in key), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("what", ["nothing", "another kind", "another shape", "another scale"])
def test_an_adapter_that_does_not_fit_is_refused_by_its_path(tmp_path: Path, what: str) -> None:
    base = saved_base(tmp_path)
    path = tmp_path / "adapter"
    if what == "another kind":
        path.mkdir()
        (path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    if what == "another shape":
        wide = make_tiny_qwen3(len(TOKENIZER), hidden_size=32, layers=2)
        add_lora(wide, r=3, alpha=6, seed=0)
        save_adapter(wide, path)
    if what == "another scale":
        save_adapter(trained(base), path)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    with pytest.raises(ValueError, match=str(path)):
        load_adapter(loaded(base), path, name="reward")


def test_an_adapter_of_another_base_with_the_same_shapes_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    save_adapter(trained(base), tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    load_adapter(loaded(other), tmp_path / "adapter", name="reward")  # a copy is the same base
    weights = load_file(other / "model.safetensors")
    save_file(
        {key: value + 1 for key, value in weights.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"{tmp_path / 'adapter'} was trained on {base}, .* than {other}"):
        load_adapter(loaded(other), tmp_path / "adapter", name="reward")


def test_nothing_but_an_adapter_is_replaced_by_one(tmp_path: Path) -> None:
    model = trained(saved_base(tmp_path))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="is no adapter"):
        save_adapter(model, tmp_path / "mine")
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_a_reward_model_with_an_adapter_is_exported_with_its_head(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = load_score_model(base, dtype=torch.float32, device="cpu", new_head=1.0)
    add_lora(model, r=2, alpha=4, seed=0)
    randomize(model)
    assert not hasattr(model.score, "lora_A")
    written = save_score_model(model, TOKENIZER, tmp_path / "run" / "model", card="scores")
    plain = load_score_model(written, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(says(plain), says(model), rtol=1e-5, atol=1e-5)
    adapter_path = tmp_path / "run" / "adapter"
    assert torch.equal(adapter_head(adapter_path), model.score.weight)
    fresh = load_score_model(base, dtype=torch.float32, device="cpu", new_head=0.0)
    wrapped = PeftModel.from_pretrained(fresh, adapter_path).eval()
    torch.testing.assert_close(says(wrapped), says(model), rtol=1e-5, atol=1e-5)
