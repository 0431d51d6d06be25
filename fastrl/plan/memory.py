"""Bytes of device memory of a training step, and the largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import replace

from fastrl.plan.cost import CHUNK_BYTES
from fastrl.plan.layers import BFLOAT16, LayerCost
from fastrl.plan.workload import Workload

# Of one parameter: weight, float32 gradient and two moments; a bfloat16 weight has a float32 master beside it.
STATE_BYTES = {2: 18, 4: 16}
OPTIMIZER_BYTES = {2: 12, 4: 8}  # the part of it that ranks can share out: moments and master


def training_memory(
    work: Workload, layer: LayerCost = BFLOAT16, *, ranks: int = 1, chunk_bytes: int = CHUNK_BYTES
) -> dict[str, float]:
    """Bytes by what holds them, at the peak: the backward pass of a full micro-batch.

    Args:
        layer: what a layer keeps.
        ranks: processors that share the optimizer's state out; 1 keeps all of it on each.
        chunk_bytes: float32 logits of one chunk of the head.
    """
    shape, element = work.shape, layer.element
    tokens = min(work.micro_tokens, work.tokens)
    rows = tokens * work.head_rows / max(1.0, work.tokens)
    shared = OPTIMIZER_BYTES[element]
    kept = layer.kept(shape)
    # With checkpointing each layer keeps its input, and one layer at a time everything.
    activations = tokens * (shape.layers * element * shape.hidden + kept if work.checkpointing else shape.layers * kept)
    logits = min(chunk_bytes, 4.0 * rows * shape.vocab)
    d_weight = 0.0 if work.lora_r else 4.0 * shape.head
    frozen = float(element) * shape.parameters if work.lora_r else 0.0
    return {
        "weights, gradients": frozen + float(STATE_BYTES[element] - shared) * work.trainable,
        "optimizer state": float(shared) * work.trainable / ranks,
        # with adapters it is the policy without them
        "reference": float(element) * shape.parameters if work.has_reference and not work.lora_r else 0.0,
        "activations": activations,
        # logits of a chunk and the gradient's operand beside them; d weight and d hidden in float32
        "head": logits * (1 + element / 4) + d_weight + (4.0 + element) * rows * shape.hidden,
    }


def largest_micro_batch(work: Workload, memory: float, layer: LayerCost = BFLOAT16, *, ranks: int = 1) -> int:
    """Most tokens of a micro-batch that fit into `memory` bytes, in steps of 1,024; 0 when not even those fit."""
    # A step as large as the micro-batch, or `tokens` would cap it.
    full = replace(work, prompts=1_000_000)
    low, high = 0, 4096
    while low < high:
        middle = (low + high + 1) // 2
        sized = replace(full, micro_tokens=1024 * middle)
        fits = sum(training_memory(sized, layer, ranks=ranks).values()) <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return 1024 * low
