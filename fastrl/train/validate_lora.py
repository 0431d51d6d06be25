"""Rules about LoRA and QLoRA: what is set has an effect, and the packages it needs are installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from fastrl.train.config import TrainConfig


def lora_problems(config: TrainConfig) -> Iterator[str]:
    """An adapter needs peft, 4 bits need bitsandbytes and an adapter to train."""
    if not config.use_peft:
        for key in ("lora_r", "lora_alpha", "lora_target_modules"):
            if getattr(config, key) != getattr(TrainConfig, key):
                yield f"{key}: has no effect while use_peft is false; set that too"
        if config.load_in_4bit:
            yield "load_in_4bit: weights in 4 bits cannot be trained; set use_peft true to train an adapter over them"
        return
    if find_spec("peft") is None:
        yield "use_peft: needs the package peft, which is not installed; pip install peft"
    if config.load_in_4bit and find_spec("bitsandbytes") is None:
        yield "load_in_4bit: needs the package bitsandbytes, which is not installed; pip install bitsandbytes"
    if not config.lora_target_modules:
        yield "lora_target_modules: is empty; name linear layers such as q_proj, or all-linear"
