"""GRPO with vLLM as its sampler: the gap to the trainer, adapters, updates that never arrive, the same learning."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.recipes import grpo
from fastrl.recipes.tiny import made
from fastrl.rollout import vllm_engine, vllm_start, vllm_weights
from fastrl.rollout.vllm_engine import VLLMEngine
from fastrl.rollout.vllm_probe import SamplerWeightsError
from fastrl.rollout.vllm_start import VLLMStartError
from fastrl.train.config import DataBlock, GRPOConfig, ReportBlock, RolloutBlock, VLLMBlock
from fastrl.train.engine import opened_engine
from fastrl.train.from_config import model_of, tokenizer_of
from tests.recipes.runs import Base, grpo_config, metrics_of

pytestmark = pytest.mark.vllm

VLLM = RolloutBlock(engine="vllm", batch_size=64, vllm=VLLMBlock(kv_cache_gib=0.1))


def vllm_config(base: Base, output_dir: Path, **changes: Any) -> GRPOConfig:
    return replace(grpo_config(base, output_dir, rollout=VLLM), **changes)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(folder) if "loss" in line]


def assert_sampler_and_trainer_agree(lines: list[dict[str, Any]], *, most_tokens: int) -> None:
    """The mean difference times the number of tokens bounds every single difference."""
    for line in lines:
        gap = line["sampling/sampling_logp_difference/mean"]
        assert gap <= 1e-4
        assert gap * most_tokens <= 1e-4, (line["step"], gap)


def test_every_step_of_a_run_samples_with_the_weights_of_that_step(base: Base, tmp_path: Path) -> None:
    assert grpo.run(vllm_config(base, tmp_path / "run", max_steps=20)) == 0
    lines = steps_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(line["grad_norm"] > 0 for line in lines)
    assert_sampler_and_trainer_agree(lines, most_tokens=8 * 6)
    assert lines[-1]["entropy"] < 0.9 * lines[0]["entropy"]  # the weights moved, so old ones would have shown


def test_an_adapter_is_pushed_as_one_and_the_base_never_changes(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[dict[str, torch.Tensor]] = []
    numbers: list[int] = []
    close, load = VLLMEngine.close, VLLMEngine.load_weights

    def closed(self: VLLMEngine) -> None:
        (model,) = self.llm.collective_rpc(lambda worker: worker.model_runner.get_model())
        bases.append({name: value.clone() for name, value in model.named_parameters()})
        close(self)

    def loaded(self: VLLMEngine, model: Any, version: int) -> None:
        load(self, model, version)
        numbers.append(self.adapter.lora_int_id)

    monkeypatch.setattr(VLLMEngine, "close", closed)
    monkeypatch.setattr(VLLMEngine, "load_weights", loaded)
    assert grpo.run(vllm_config(base, tmp_path / "run", max_steps=6, use_peft=True, lora_r=4, lora_alpha=8)) == 0
    lines = steps_of(tmp_path / "run")
    assert_sampler_and_trainer_agree(lines, most_tokens=8 * 6)
    assert lines[-1]["entropy"] != pytest.approx(lines[0]["entropy"], rel=1e-3)
    assert numbers == [1, 2, 3, 4, 5, 6]
    (held,) = bases
    on_disk = load_file(base.model / "model.safetensors")
    for layer in range(2):
        kept = next(value for name, value in held.items() if f"layers.{layer}.mlp.down_proj" in name)
        assert torch.equal(kept, on_disk[f"model.layers.{layer}.mlp.down_proj.weight"])
        fused = next(value for name, value in held.items() if f"layers.{layer}.self_attn.qkv_proj" in name)
        parts = [on_disk[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(fused, torch.cat(parts))


def test_an_update_that_never_arrives_stops_the_run_after_the_first_step(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "push_weights", lambda *_, **__: None)
    with pytest.raises(SamplerWeightsError, match="version 1"):
        grpo.run(vllm_config(base, tmp_path / "run", learning_rate=1e-5))
    assert len(steps_of(tmp_path / "run")) == 1


def test_reload_weights_over_packed_weights_says_nothing_and_is_found(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own failure: with oneDNN's packing on, `reload_weights` succeeds and the old weights go on sampling."""
    from vllm import _custom_ops

    def reloaded(llm: Any, model: Any, **_: Any) -> None:
        model.save_pretrained(copy)
        llm.collective_rpc("reload_weights")

    copy = tmp_path / "model"
    shutil.copytree(base.model, copy)
    monkeypatch.setattr(_custom_ops, "_supports_onednn", True)
    monkeypatch.setattr(vllm_start, "start_without_packing", lambda: None)
    monkeypatch.setattr(vllm_engine, "push_weights", reloaded)
    with pytest.raises(SamplerWeightsError, match="version 1"):
        grpo.run(vllm_config(base, tmp_path / "run", model_name_or_path=str(copy)))
    assert len(steps_of(tmp_path / "run")) == 1


def test_the_way_weights_take_on_a_gpu_arrives_too(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's layer-by-layer reload, which a GPU's kernels need, run here on a CPU."""
    push = vllm_weights.push_weights
    monkeypatch.setattr(vllm_engine, "push_weights", lambda llm, model, **_: push(llm, model, is_cpu=False))
    assert grpo.run(vllm_config(base, tmp_path / "run")) == 0
    assert_sampler_and_trainer_agree(steps_of(tmp_path / "run"), most_tokens=8 * 6)


def test_weights_that_the_trainer_does_not_name_are_refused(base: Base, tmp_path: Path) -> None:
    config = vllm_config(base, tmp_path / "run")
    policy, tokenizer = model_of(config), tokenizer_of(config)
    with opened_engine(config, policy, tokenizer) as engine:
        policy.model.layers[0].mlp.down_proj.register_parameter("weight", None)
        with pytest.raises(ValueError, match=r"has 1 weights that Qwen3ForCausalLM does not name, .*down_proj.weight"):
            engine.load_weights(policy, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer", "vLLM's tokenizer differs from the trainer's: token"),
        ("memory", "too little memory.*rollout.vllm.kv_cache_gib"),
        ("class", "vLLM has no model class Unheard; use rollout.engine builtin"),
    ],
)
def test_what_vllm_cannot_serve_is_one_sentence_before_training(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    config = vllm_config(base, tmp_path / "run")
    if change == "memory":
        config = replace(config, rollout=replace(VLLM, vllm=VLLMBlock(kv_cache_gib=1e5)))
    started = vllm_engine.started

    def changed(path: str, model: Any, tokenizer: Any, settings: Any) -> Any:
        if change == "tokenizer":
            tokenizer.add_tokens(["<new>"])
        if change == "class":
            model.__class__ = type("Unheard", (type(model),), {})
        return started(path, model, tokenizer, settings)

    monkeypatch.setattr(vllm_engine, "started", changed)
    with pytest.raises(VLLMStartError, match=message):
        grpo.run(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not steps_of(tmp_path / "run")


def test_the_process_keeps_its_threads_and_random_state(base: Base, tmp_path: Path) -> None:
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    grpo.run(vllm_config(base, tmp_path / "run", max_steps=1))
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_threads
    assert not torch.distributed.is_initialized()


def test_the_same_seeds_earn_the_same_under_both_engines(tmp_path: Path) -> None:
    """Mean reward of ten steps from the warm start: means over five seeds differ by less than two standard errors."""
    earned: dict[str, list[float]] = {"builtin": [], "vllm": []}
    for engine, rewards in earned.items():
        for seed in range(5):
            config = GRPOConfig(
                model_name_or_path=str(made("wide")),
                output_dir=str(tmp_path / f"{engine}-{seed}"),
                train_dataset=str(made("prompts")),
                reward_funcs=("exact_match",),
                seed=seed,
                max_steps=10,
                per_device_train_batch_size=256,
                max_completion_length=8,
                learning_rate=5e-4,
                data=DataBlock(max_rows=2000),
                rollout=replace(VLLM, engine=engine, vllm=VLLM.vllm if engine == "vllm" else VLLMBlock()),
                report=ReportBlock(panel=False),
            )
            assert grpo.run(config) == 0
            rewards.append(statistics.mean(line["reward"] for line in steps_of(tmp_path / f"{engine}-{seed}")))
    builtin, vllm = earned["builtin"], earned["vllm"]
    error = sqrt((statistics.variance(builtin) + statistics.variance(vllm)) / 5)
    difference = statistics.mean(vllm) - statistics.mean(builtin)
    print(f"builtin {builtin}, vllm {vllm}: difference {difference:+.4f}, standard error {error:.4f}")
    assert abs(difference) < 2 * error
