"""The engine of `rollout.engine: vllm_server`, from a run's configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

from fastrl.rollout.builtin import context_length
from fastrl.rollout.server_engine import Limits, ServerEngine
from fastrl.rollout.server_http import Client
from fastrl.rollout.server_member import Server
from fastrl.rollout.server_nccl import Nccl
from fastrl.rollout.server_process import Launch, ServerProcess
from fastrl.rollout.server_weights import Adapters, Files, Transport
from fastrl.rollout.vllm_probe import TOLERANCE
from fastrl.rollout.vllm_start import CPU_CACHE_GIB, LORA_RANKS
from fastrl.train.config import EvalConfig, GKDConfig, InferenceConfig, OnPolicyConfig, ServerBlock, TrainConfig
from fastrl.train.lora_files import save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG = "vllm-server-{}.log"


def server_engine(
    config: OnPolicyConfig | InferenceConfig | GKDConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> ServerEngine:
    """vLLM servers with the weights that the policy starts from.

    Raises:
        ServerError: a server does not come up, or does not fit; the message says what to change.
    """
    return engine_over(servers_of(config, policy), transport_of(config, policy), config, policy, tokenizer)


def engine_over(
    servers: Sequence[Server],
    transport: Transport,
    config: OnPolicyConfig | InferenceConfig | GKDConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> ServerEngine:
    """The engine over these servers, with the limits of the configuration."""
    block = config.rollout.server
    return ServerEngine(
        policy,
        tokenizer,
        servers=servers,
        transport=transport,
        context=block.max_model_len,
        with_adapters=_has_adapter(config),
        limits=Limits(
            request_seconds=block.request_seconds,
            concurrency=block.concurrency,
            lost_calls=block.lost_steps,
            probe_tolerance=TOLERANCE[policy.dtype] if block.probe_tolerance is None else block.probe_tolerance,
        ),
    )


def launch_of(config: OnPolicyConfig | InferenceConfig | GKDConfig, policy: PreTrainedModel, number: int) -> Launch:
    """How to start server `number` of a run on this machine."""
    block = config.rollout.server
    length = min(context_length(policy), block.max_model_len or sys.maxsize)
    arguments = ["--dtype", str(policy.dtype).removeprefix("torch."), "--seed", "0"]
    arguments += ["--max-num-seqs", str(block.concurrency)]
    arguments += ["--gpu-memory-utilization", str(block.gpu_memory_utilization)]
    cache = CPU_CACHE_GIB if block.kv_cache_gib is None and policy.device.type == "cpu" else block.kv_cache_gib
    if cache is not None:
        arguments += ["--kv-cache-memory-bytes", str(int(cache * 2**30))]
    if length < 2**31:  # a model without a limit: vLLM reads its configuration
        arguments += ["--max-model-len", str(length)]
    if config.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if _kind(block, policy) == "nccl":
        arguments += ["--weight-transfer-config", '{"backend": "nccl"}']
    if isinstance(config, TrainConfig) and config.use_peft:
        rank = next(each for each in LORA_RANKS if each >= config.lora_r)
        arguments += ["--enable-lora", "--max-lora-rank", str(rank)]
    directory = config.output_dir if isinstance(config, (TrainConfig, EvalConfig)) else None
    devices = {"CUDA_VISIBLE_DEVICES": block.devices[number]} if block.devices else {}
    return Launch(
        model=config.model_name_or_path,
        log=Path(directory or gettempdir()) / LOG.format(number),
        bind=block.bind,
        port=None if block.port is None else block.port + number,
        python=block.python or sys.executable,
        arguments=(*arguments, *block.arguments),
        environment=devices,
        seconds=block.start_seconds,
    )


def servers_of(config: OnPolicyConfig | InferenceConfig | GKDConfig, policy: PreTrainedModel) -> list[Server]:
    """The servers that the configuration names, or those to start; none is asked for anything yet."""
    block = config.rollout.server
    key = os.environ.get(block.api_key_env, "")
    sources: list[Client | ServerProcess] = [Client(url, api_key=key, retries=block.retries) for url in block.urls]
    sources = sources or [ServerProcess(launch_of(config, policy, number)) for number in range(block.count)]
    return [
        Server(source, retries=block.retries, seconds=block.update_seconds, patience_seconds=block.patience_seconds)
        for source in sources
    ]


def transport_of(config: OnPolicyConfig | InferenceConfig | GKDConfig, policy: PreTrainedModel) -> Transport:
    """How weights travel to them."""
    block = config.rollout.server
    if _has_adapter(config):
        return Adapters(save_adapter, block.directory)
    if _kind(block, policy) == "nccl":
        return Nccl(block.address)
    return Files(block.directory)


def _kind(block: ServerBlock, policy: PreTrainedModel) -> str:
    if block.transfer != "auto":
        return block.transfer
    return "nccl" if policy.device.type == "cuda" else "files"


def _has_adapter(config: OnPolicyConfig | InferenceConfig | GKDConfig) -> bool:
    return isinstance(config, TrainConfig) and config.use_peft
