"""How vLLM runs inside the trainer's process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VLLMBlock:
    """vLLM beside the trainer, in one process and on one device; see docs/vllm.md.

    Attributes:
        gpu_memory_utilization: share of the GPU's memory that vLLM may fill while it samples, weights included; on a
            CPU kv_cache_gib alone counts.
        kv_cache_gib: memory for keys and values; None is 1 on a CPU, and on a GPU what the share above leaves.
        max_model_len: most tokens of prompt and completion together; None is the model's context.
        enforce_eager: run without CUDA graphs: a faster start and less memory, slower sampling. A CPU always does.
        sleep: hand the GPU's memory back while the trainer trains; a CPU has nothing to hand back.
        probe_tolerance: mean difference of log-probabilities, in nats, at which vLLM no longer counts as holding the
            trainer's weights; None is 0.001 in float32 and 0.2 in bfloat16.
    """

    gpu_memory_utilization: float = 0.4
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    enforce_eager: bool = False
    sleep: bool = True
    probe_tolerance: float | None = None
