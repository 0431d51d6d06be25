"""Rules of a run on several ranks: what must hold of the configuration and the launcher's numbers together."""

from __future__ import annotations

from collections.abc import Iterator

from fastrl.train.config import GKDConfig, OnPolicyConfig, TrainConfig
from fastrl.train.ranks import launched_ranks

Problems = Iterator[str]


def launched_step_size(config: TrainConfig) -> int:
    """Rows or completions of one optimizer step, over the ranks that the launcher has started."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * launched_ranks().size


def times_ranks() -> str:
    """The factor of a product of batch sizes that the launcher brings, for messages."""
    size = launched_ranks().size
    return f" x {size} ranks" if size > 1 else ""


def ranks_problems(config: TrainConfig) -> Problems:
    """Rules of every recipe with an optimizer."""
    if config.distributed.shard == "full":
        yield (
            "distributed.shard: full (each weight on one rank only, FSDP) is not there: the model must fit on every "
            "device; use optimizer, which shards master weights and moments, and use_peft where that is not enough"
        )


def sampling_ranks_problems(config: OnPolicyConfig | GKDConfig) -> Problems:
    """Rules of every recipe that samples, on several ranks."""
    if launched_ranks().size == 1:
        return
    if config.rollout.engine == "vllm":
        yield (
            "rollout.engine: vllm lives in the trainer's process, which must then be the only one; with several ranks "
            "use builtin, or vllm_server with servers that run already"
        )
