"""Rules of sampling with vLLM beside the trainer; nothing here imports torch or vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from fastrl.rollout.vllm_version import version_problem
from fastrl.train.config import GenerateConfig, GKDConfig, InferenceConfig, OnPolicyConfig, TrainConfig, VLLMBlock

LEAST_TEMPERATURE = 0.01  # as in fastrl.rollout.vllm_sampling, which imports torch; a test compares
MOST_LORA_RANK = 512


def vllm_problems(config: OnPolicyConfig | InferenceConfig | GKDConfig) -> Iterator[str]:
    """What vLLM cannot do, would do from another distribution, or is not there to do."""
    block, default = config.rollout.vllm, VLLMBlock()
    if config.rollout.engine != "vllm":
        for field in fields(VLLMBlock):
            if getattr(block, field.name) != getattr(default, field.name):
                yield (
                    f"rollout.vllm.{field.name}: has no effect while rollout.engine is {config.rollout.engine}; "
                    "set that to vllm"
                )
        return
    if (problem := version_problem()) is not None:
        yield f"rollout.engine: {problem}"
    yield from distribution_problems(config)


def distribution_problems(config: OnPolicyConfig | InferenceConfig | GKDConfig) -> Iterator[str]:
    """What any vLLM cannot do, or would do from another distribution."""
    if 0 < config.temperature < LEAST_TEMPERATURE:
        yield f"temperature: vLLM takes 0 or at least {LEAST_TEMPERATURE}, got {config.temperature}; set 0 for greedy"
    if isinstance(config, (OnPolicyConfig, GenerateConfig)) and config.top_p < 1 and config.min_p > 0:
        yield "min_p: vLLM applies it before top_p, which is another distribution; set one of them"
    if not isinstance(config, TrainConfig):
        return
    if config.load_in_4bit:
        yield "load_in_4bit: vLLM would sample from the base in full precision; use rollout.engine builtin"
    if config.use_peft and config.lora_r > MOST_LORA_RANK:
        yield f"lora_r: vLLM has adapters up to {MOST_LORA_RANK}, got {config.lora_r}; lower it"
