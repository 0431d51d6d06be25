"""Rules about vLLM beside the trainer: each broken one is a line that starts with the option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastrl.rollout import vllm_sampling, vllm_start
from fastrl.train import validate_vllm
from fastrl.train.config import GKDConfig, GRPOConfig, RolloutBlock, VLLMBlock
from fastrl.train.validate import problems

VLLM = RolloutBlock(engine="vllm")


def config(**changes: Any) -> GRPOConfig:
    return GRPOConfig(
        model_name_or_path="tiny:wide",
        output_dir="out",
        train_dataset="tiny:prompts",
        reward_funcs=("exact_match",),
        **{"rollout": VLLM} | changes,
    )


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"temperature": 0.005}, "temperature: vLLM takes 0 or at least 0.01"),
        ({"top_p": 0.9, "min_p": 0.1}, "min_p: vLLM applies it before top_p"),
        ({"use_peft": True, "lora_r": 1000}, "lora_r: vLLM has adapters up to 512"),
        ({"use_peft": True, "load_in_4bit": True}, "load_in_4bit: vLLM would sample from the base in full"),
        ({"rollout": RolloutBlock(vllm=VLLMBlock(kv_cache_gib=1.0))}, "rollout.vllm.kv_cache_gib: has no effect"),
        ({"rollout": replace(VLLM, vllm=VLLMBlock(gpu_memory_utilization=1.0))}, "rollout.vllm.gpu_memory_utilization"),
    ],
)
def test_what_vllm_cannot_do_is_one_line(changes: dict[str, Any], start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_vllm, "version_problem", lambda: None)
    assert problems(config()) == []
    (problem,) = problems(config(**changes))
    assert problem.startswith(start)


def test_a_missing_vllm_is_found_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_vllm, "version_problem", lambda: "vLLM is not installed; pip install it")
    gkd = GKDConfig(
        model_name_or_path="tiny:wide",
        output_dir="out",
        train_dataset="tiny:sft",
        teacher_model_name_or_path="tiny:sorted",
        rollout=VLLM,
    )
    for each in (config(), gkd):
        assert problems(each) == ["rollout.engine: vLLM is not installed; pip install it"]


def test_limits_are_those_of_the_engine() -> None:
    assert validate_vllm.LEAST_TEMPERATURE == vllm_sampling.LEAST_TEMPERATURE
    assert vllm_start.LORA_RANKS[-1] == validate_vllm.MOST_LORA_RANK
