"""vLLM on other processes or machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ServerBlock:
    """vLLM servers that sample; see docs/vllm_server.md.

    Attributes:
        urls: of servers that run already, as http://host:port; empty starts our own on this machine.
        api_key_env: the environment variable that holds the key of `urls`.
        count: servers to start.
        devices: CUDA_VISIBLE_DEVICES of each server that is started, as "0,1"; empty leaves them all devices.
        bind: address that a server which is started listens on; any but the loopback lets other machines in.
        port: of a server that is started; null takes a free one.
        python: interpreter that has vLLM, with the torch it wants; null is the trainer's own.
        arguments: further options of `vllm serve`, as [--tensor-parallel-size, "2"].
        gpu_memory_utilization: share of a GPU's memory that a server which is started may fill.
        kv_cache_gib: memory for its keys and values; null is 1 on a CPU, and on a GPU what the share above leaves.
        max_model_len: most tokens of prompt and completion together; null is the model's context.
        transfer: how weights travel: "nccl" from GPU to GPU, "files" through a directory that trainer and servers
            share; "auto" is nccl when the policy is on a GPU. A LoRA adapter is always a file.
        directory: where those files lie; null is the system's place for temporary files. Servers on other machines
            need one on a network disk.
        address: of this machine, that servers on other machines can reach; NCCL meets there.
        start_seconds: for a server to come up.
        request_seconds: for one completion; then it is aborted, and lost.
        update_seconds: for one message of a weight update.
        patience_seconds: how long a server of `urls` may be unreachable before it is given up for this step.
        retries: of a request after a broken connection or status 408, 429 or 5xx.
        concurrency: completions in flight at one server.
        lost_steps: rounds in a row that may lose all their completions; the last of them stops the run.
        probe_tolerance: see rollout.vllm.probe_tolerance.
    """

    urls: tuple[str, ...] = ()
    api_key_env: str = "VLLM_API_KEY"
    count: int = 1
    devices: tuple[str, ...] = ()
    bind: str = "127.0.0.1"
    port: int | None = None
    python: str | None = None
    arguments: tuple[str, ...] = ()
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    transfer: Literal["auto", "files", "nccl"] = "auto"
    directory: str | None = None
    address: str = "127.0.0.1"
    start_seconds: float = 600.0
    request_seconds: float = 600.0
    update_seconds: float = 300.0
    patience_seconds: float = 60.0
    retries: int = 4
    concurrency: int = 64
    lost_steps: int = 3
    probe_tolerance: float | None = None
