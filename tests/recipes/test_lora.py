"""LoRA and QLoRA through whole runs: what is saved, resumed, exported, sampled from, and what the reference is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.recipes import grpo, sft
from fastrl.train import ahead, fit, from_config
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.lora import adapter_off
from fastrl.train.model import load_model
from tests.recipes.runs import (
    Base,
    after_call,
    assert_same_run,
    column,
    grpo_config,
    learning_curve,
    metrics_of,
    run_grpo,
    send_sigterm,
    sft_config,
    weights_of,
)
from tests.recipes.test_resuming import resumed
from tests.recipes.test_sft import loss_by_hand

LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}
NEEDS_4BIT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = [
    pytest.param(LORA, id="lora"),
    pytest.param(LORA | {"load_in_4bit": True, "gradient_checkpointing": True}, id="qlora", marks=NEEDS_4BIT),
]


def run_sft(base: Base, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    assert sft.run(sft_config(base, folder, **changes)) == 0
    return metrics_of(folder)


def test_a_lora_run_starts_where_the_base_is_and_learns_without_touching_it(base: Base, tmp_path: Path) -> None:
    before = (base.model / "model.safetensors").read_bytes()
    full = run_sft(base, tmp_path / "full", max_steps=1)
    lines = run_sft(base, tmp_path / "run", max_steps=12, learning_rate=3e-2, **LORA)
    assert lines[0]["loss"] == full[0]["loss"]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert (base.model / "model.safetensors").read_bytes() == before
    start, end = load_file(base.model / "model.safetensors"), weights_of(tmp_path / "run")
    assert start.keys() == end.keys()
    assert all(torch.equal(start[key], end[key]) == ("_proj" not in key) for key in start)


def test_the_optimizer_state_holds_the_adapter_alone(base: Base, tmp_path: Path) -> None:
    run_sft(base, tmp_path, max_steps=2, lora_target_modules=("q_proj",), **LORA)
    state = load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    names = {key.partition(".")[2] for key in state}
    assert len(names) == 2 * 2
    assert all(".q_proj.lora_" in name for name in names)


@pytest.mark.parametrize("changes", KINDS)
def test_a_stopped_run_resumes_bit_for_bit(
    base: Base, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 5, "save_steps": 2, **changes}
    run_sft(base, tmp_path / "whole", **changes)
    config = sft_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=3, do=send_sigterm)
        assert sft.run(config) == EXIT_INTERRUPTED
    assert sft.run(resumed(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=5)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("changes", KINDS)
def test_grpo_samples_from_base_and_adapter_and_compares_with_the_base_alone(
    base: Base, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = from_config.load_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        loaded.append(original(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(from_config, "load_model", counted)
    lines = run_grpo(base, tmp_path / "run", beta=0.05, learning_rate=3e-2, num_iterations=2, max_steps=6, **changes)
    assert len(loaded) == 1  # policy, reference and sampler
    assert max(column(lines, "sampling/sampling_logp_difference/mean")) < 1e-5
    kl = column(lines, "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-12)
    assert kl[2] > 1e-4
    with adapter_off(loaded[0]):
        fresh = original(base.model, dtype=torch.float32, device="cpu", load_in_4bit="load_in_4bit" in changes)
        ids = torch.tensor([[3, 4, 5, 6]])
        with torch.no_grad():
            assert torch.equal(loaded[0](input_ids=ids).logits, fresh(input_ids=ids).logits)


def test_grpo_with_an_adapter_resumes_bit_for_bit(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"beta": 0.05, "save_steps": 2, **LORA}
    assert grpo.run(grpo_config(base, tmp_path / "whole", **changes)) == 0
    config = grpo_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, ahead, "collect_round", number=2, do=send_sigterm)
        assert grpo.run(config) == EXIT_INTERRUPTED
    assert grpo.run(resumed(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=4)


def test_the_exported_model_is_the_next_stages_start(base: Base, tmp_path: Path) -> None:
    held_out = {"eval_dataset": str(base.files.sft)}
    lines = run_sft(base, tmp_path / "one", max_steps=4, **held_out, **LORA)
    model = load_model(tmp_path / "one" / "model", dtype=torch.float32, device="cpu")
    assert lines[-1]["eval/loss"] == pytest.approx(loss_by_hand(model, base, list(range(40))), rel=1e-5)
    next_stage = Base(tmp_path / "one" / "model", base.files)
    assert run_sft(next_stage, tmp_path / "two", max_steps=1)[0]["loss"] < lines[0]["loss"]


def test_checkpointed_activations_change_no_number(base: Base, tmp_path: Path) -> None:
    run_sft(base, tmp_path / "plain", **LORA)
    run_sft(base, tmp_path / "checkpointed", gradient_checkpointing=True, **LORA)
    plain, checkpointed = (learning_curve(tmp_path / name) for name in ("plain", "checkpointed"))
    for name in ("loss", "grad_norm"):
        assert column(plain, name) == pytest.approx(column(checkpointed, name), rel=1e-5)
