"""Rules for sampling ahead of training."""

from __future__ import annotations

from collections.abc import Iterator

from fastrl.train.config import GKDConfig, GRPOConfig, InferenceConfig, OnPolicyConfig, RolloutBlock
from fastrl.train.ranks import launched_ranks


def ahead_problems(config: OnPolicyConfig | GKDConfig | InferenceConfig) -> Iterator[str]:
    block, default = config.rollout, RolloutBlock()
    if block.max_staleness == 0:
        for key in ("segment_tokens", "timeout_seconds"):
            if getattr(block, key) != getattr(default, key):
                yield f"rollout.{key}: has no effect while rollout.max_staleness is 0; set that, or remove this"
        return
    if not isinstance(config, GRPOConfig):
        yield (
            "rollout.max_staleness: only grpo and its algorithms sample ahead, because they correct for the weights "
            "that sampled; remove it"
        )
        return
    if config.rollout.engine == "vllm":
        yield (
            "rollout.max_staleness: vLLM in the trainer's own process samples and learns in turns; set rollout.engine "
            "to vllm_server, whose process is another, or max_staleness to 0"
        )
    if config.rollout.engine != "builtin" and block.timeout_seconds != default.timeout_seconds:
        yield "rollout.timeout_seconds: is of the built-in engine's own process; remove it"
    if config.load_in_4bit and config.rollout.engine == "builtin":
        yield (
            "rollout.max_staleness: the built-in engine samples ahead in a process of its own, which cannot map 4-bit "
            "weights; set load_in_4bit to false, or max_staleness to 0"
        )
    if launched_ranks().size > 1:
        yield (
            "rollout.max_staleness: one trainer process samples ahead, and a launcher started several; start one, or "
            "set max_staleness to 0"
        )
    if block.segment_tokens is not None and (config.environment.factory or config.environment.tools):
        yield "rollout.segment_tokens: episodes with tools are sampled turn by turn; remove it"
