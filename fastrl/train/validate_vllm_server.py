"""Rules of sampling with vLLM servers; nothing here imports torch or vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

from fastrl.rollout.vllm_version import version_problem
from fastrl.train.config import GKDConfig, InferenceConfig, OnPolicyConfig, RolloutBlock, ServerBlock, TrainConfig
from fastrl.train.ranks import launched_ranks
from fastrl.train.validate_vllm import distribution_problems

Problems = Iterator[str]
STARTED = (
    *("count", "devices", "bind", "port", "python", "arguments"),
    *("gpu_memory_utilization", "kv_cache_gib", "start_seconds"),
)
RUNNING = ("api_key_env", "patience_seconds")  # of servers that run already


def server_problems(config: OnPolicyConfig | InferenceConfig | GKDConfig) -> Problems:
    """What a server cannot do, and options that would be ignored."""
    if config.rollout.engine != "vllm_server":
        yield from _set(
            config.rollout.server, [field.name for field in fields(ServerBlock)], "rollout.engine is not it"
        )
        return
    yield from distribution_problems(config)
    yield from _urls(config.rollout.server)
    yield from _started(config.rollout.server)
    yield from _transfer(config)
    if config.rollout.timeout_seconds != RolloutBlock().timeout_seconds:
        yield "rollout.timeout_seconds: is for engines in a process of ours; set rollout.server.request_seconds"


def _urls(block: ServerBlock) -> Problems:
    for url in block.urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            yield f"rollout.server.urls: {url!r} must be http://host:port or https://host:port, without a password"
    if len(set(block.urls)) < len(block.urls):
        yield "rollout.server.urls: a server is named twice"
    if block.urls:
        yield from _set(block, STARTED, "rollout.server.urls names servers that run already")
        if not os.environ.get(block.api_key_env):
            yield (
                f"rollout.server.api_key_env: {block.api_key_env} is not set; give it the key of the servers, which "
                "they have in VLLM_API_KEY"
            )
        return
    yield from _set(block, RUNNING, "the servers are started by the run")


def _started(block: ServerBlock) -> Problems:
    if block.urls:
        return
    if launched_ranks().size > 1:
        yield (
            "rollout.server.urls: with several ranks start the servers first and name them here; "
            "docs/vllm_server.md has the command"
        )
    if block.devices and len(block.devices) != block.count:
        yield f"rollout.server.devices: must have one entry for each of the {block.count} servers"
    if block.python is None and (problem := version_problem()) is not None:
        yield f"rollout.engine: {problem}, or name an interpreter that has vLLM in rollout.server.python"
    if block.python is not None and not os.access(block.python, os.X_OK):
        yield f"rollout.server.python: {block.python} is not an interpreter that can be run"


def _transfer(config: OnPolicyConfig | InferenceConfig | GKDConfig) -> Problems:
    block = config.rollout.server
    is_lora = isinstance(config, TrainConfig) and config.use_peft
    if is_lora and block.transfer != "auto":
        yield "rollout.server.transfer: an adapter (use_peft) is always a file; leave it out"
    if block.transfer == "nccl" and block.directory is not None:
        yield "rollout.server.directory: has no effect with transfer nccl"
    if block.transfer == "files" and block.address != ServerBlock().address:
        yield "rollout.server.address: has no effect with transfer files"
    if block.directory is not None and not Path(block.directory).is_dir():
        yield f"rollout.server.directory: there is no directory {block.directory}"


def _set(block: ServerBlock, names: list[str] | tuple[str, ...], why: str) -> Problems:
    """Options that differ from their defaults although nothing would read them."""
    default = ServerBlock()
    for name in names:
        if getattr(block, name) != getattr(default, name):
            yield f"rollout.server.{name}: has no effect, because {why}"
