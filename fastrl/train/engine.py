"""The engine that a recipe samples with, open from here to the end of its block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Engine
from fastrl.rollout.process import ProcessEngine
from fastrl.rollout.vllm_engine import VLLMEngine
from fastrl.rollout.vllm_start import Settings
from fastrl.train.config import GKDConfig, InferenceConfig, OnPolicyConfig, TrainConfig
from fastrl.train.distributed import size
from fastrl.train.lora_files import save_adapter
from fastrl.train.servers import server_engine
from fastrl.train.shared_servers import SharedServers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def opened_engine(
    config: OnPolicyConfig | InferenceConfig | GKDConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Engine]:
    """The engine that `config.rollout` names, sampling from `policy`; what it holds is given back on every way out.

    Recipes that end in the middle (an error, an interrupt) leave the block like those that finish, so an engine's
    processes and memory never outlive its run.
    """
    if config.rollout.engine == "vllm":
        with closing(vllm_engine(config, policy, tokenizer)) as engine:
            yield engine
        return
    if config.rollout.engine == "vllm_server":
        make = server_engine if size() == 1 else SharedServers
        with closing(make(config, policy, tokenizer)) as engine:
            yield engine
        return
    if config.rollout.engine == "builtin" and config.rollout.max_staleness > 0:
        # Threads of one process do not overlap: what samples while the trainer computes needs a process of its own.
        with closing(
            ProcessEngine(
                policy,
                tokenizer,
                batch_size=config.rollout.batch_size,
                timeout_seconds=config.rollout.timeout_seconds,
                modules=("fastrl.train.attention",),
            )
        ) as engine:
            yield engine
        return
    yield BuiltinEngine(policy, tokenizer, batch_size=config.rollout.batch_size)


def vllm_engine(
    config: OnPolicyConfig | InferenceConfig | GKDConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> VLLMEngine:
    """vLLM in this process, with the weights that the policy starts from.

    Raises:
        VLLMStartError: it cannot sample for this trainer on this machine.
    """
    block = config.rollout.vllm
    has_adapter = isinstance(config, TrainConfig) and config.use_peft
    return VLLMEngine(
        config.model_name_or_path,
        policy,
        tokenizer,
        settings=Settings(
            max_num_seqs=config.rollout.batch_size,
            lora_rank=config.lora_r if isinstance(config, TrainConfig) and has_adapter else None,
            gpu_memory_utilization=block.gpu_memory_utilization,
            kv_cache_gib=block.kv_cache_gib,
            max_model_len=block.max_model_len,
            enforce_eager=block.enforce_eager,
            sleep=block.sleep,
            trust_remote_code=config.trust_remote_code,
        ),
        write_adapter=save_adapter if has_adapter else None,
        tolerance=block.probe_tolerance,
    )
