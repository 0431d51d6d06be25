"""The order in which the engine wakes, pushes, probes and sleeps, over a vLLM that only writes it down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrl.rollout import vllm_engine
from fastrl.rollout.engine import Sampling
from fastrl.rollout.vllm_engine import VLLMEngine
from fastrl.rollout.vllm_start import Settings, options
from tests.rollout.tiny import CONTEXT, qwen3, tiny_tokenizer


class Recorder:
    """Stands where `vllm.LLM` does."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self, *, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, *, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    def probed(self: VLLMEngine, model: Any, version: int) -> float:
        recorder.calls.append(f"probe {version}")
        return 0.0

    monkeypatch.setattr(vllm_engine, "started", lambda *_: recorder)
    monkeypatch.setattr(vllm_engine, "push_weights", lambda *_, **__: recorder.calls.append("push"))
    monkeypatch.setattr(vllm_engine, "stop", lambda _: recorder.calls.append("stop"))
    monkeypatch.setattr(VLLMEngine, "_probe", probed)
    return recorder


def on_gpu(engine: VLLMEngine) -> VLLMEngine:
    engine.can_sleep = True
    return engine


def test_weights_are_dropped_in_sleep_and_pushed_before_the_cache_comes_back(llm: Recorder) -> None:
    model = qwen3()
    engine = on_gpu(VLLMEngine("model", model, tiny_tokenizer(), settings=Settings()))
    engine.load_weights(model, 1)
    engine.rest()
    engine.rest()
    with pytest.raises(RuntimeError, match="the engine rests"):
        engine.generate([[5]], Sampling())
    engine.load_weights(model, 2)
    engine.close()
    first = ["probe 0", "push", "reset", "probe 1", "sleep 2"]
    assert llm.calls == [*first, "wake weights", "push", "wake kv_cache", "reset", "probe 2", "stop"]


def test_under_an_adapter_the_base_survives_the_sleep(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3()
    engine = on_gpu(VLLMEngine("model", model, tiny_tokenizer(), settings=Settings(), write_adapter=lambda *_: None))
    assert engine.adapters is not None
    monkeypatch.setattr(engine.adapters, "next", lambda _: llm.calls.append("adapter"))
    engine.load_weights(model, 1)
    engine.rest()
    assert llm.calls == ["probe 0", "adapter", "reset", "probe 1", "sleep 1"]
    folder = engine.adapters.folder.name
    engine.close()
    assert not Path(folder).exists()


def test_a_cpu_never_sleeps(llm: Recorder) -> None:
    engine = VLLMEngine("model", qwen3(), tiny_tokenizer(), settings=Settings())
    engine.rest()
    assert llm.calls == ["probe 0"]


def test_a_probe_that_fails_at_the_start_leaves_no_vllm_behind(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: VLLMEngine, model: Any, version: int) -> float:
        raise RuntimeError("other weights")

    monkeypatch.setattr(VLLMEngine, "_probe", failing)
    with pytest.raises(RuntimeError, match="other weights"):
        VLLMEngine("model", qwen3(), tiny_tokenizer(), settings=Settings())
    assert llm.calls == ["stop"]


def test_what_vllm_is_started_with_depends_on_the_device() -> None:
    model = qwen3()
    on_cpu = options(model, Settings(lora_rank=12, max_num_seqs=4096), is_cpu=True)
    assert (on_cpu["kv_cache_memory_bytes"], on_cpu["enforce_eager"], on_cpu["enable_sleep_mode"]) == (
        2**30,
        True,
        False,
    )
    assert (on_cpu["max_lora_rank"], on_cpu["max_num_batched_tokens"]) == (16, 4096)
    gpu = options(model.bfloat16(), Settings(), is_cpu=False)
    assert (gpu["dtype"], gpu["enable_sleep_mode"], gpu["max_model_len"]) == ("bfloat16", True, CONTEXT)
    assert {"kv_cache_memory_bytes", "enable_lora", "max_num_batched_tokens"}.isdisjoint(gpu)
    assert gpu["logprobs_mode"] == "processed_logprobs"
