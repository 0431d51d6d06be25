"""A vLLM in this process that is the trainer's model and tokenizer, or one sentence why not, before anything trains."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastrl.rollout.builtin import context_length
from fastrl.rollout.vllm_version import version_problem
from fastrl.rollout.vllm_weights import start_without_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for; an adapter takes the next larger
GIB = 2**30
CPU_CACHE_GIB = 1.0
LEAST_BATCHED_TOKENS = 2048  # vLLM's own default on the smallest device: it must not be below the sequences of a step
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: its weights can be reached
    "VLLM_NO_USAGE_STATS": "1",  # no report to its makers
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are not vLLM's to pin
}


class VLLMStartError(RuntimeError):
    """vLLM cannot sample for this trainer on this machine; nothing was trained."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What vLLM is started with, besides the model.

    Attributes:
        max_num_seqs: most completions decoded together.
        lora_rank: of the adapter that will be pushed; None pushes weights.
        gpu_memory_utilization, kv_cache_gib, max_model_len, enforce_eager, sleep: see `VLLMBlock`.
        trust_remote_code: run Python code that comes with the model.
    """

    max_num_seqs: int = 256
    lora_rank: int | None = None
    gpu_memory_utilization: float = 0.4
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    enforce_eager: bool = False
    sleep: bool = True
    trust_remote_code: bool = False


def started(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Any:
    """A `vllm.LLM` with the weights in the directory `path`, in the model's dtype and beside it on its device.

    The process keeps its random state, its number of threads and its way to change that.

    Raises:
        VLLMStartError: one sentence: version, ranks, device, model class, memory, vocabulary or tokenizer.
    """
    if (problem := version_problem()) is not None:
        raise VLLMStartError(problem)
    if torch.distributed.is_initialized():
        # vLLM would make its groups out of the trainer's ranks, and destroy them with its own when it ends.
        raise VLLMStartError("several ranks cannot each hold a vLLM; use rollout.engine vllm_server")
    os.environ |= ENVIRONMENT
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with _undisturbed(model.device):
        from vllm import LLM, ModelRegistry
        from vllm.platforms import current_platform

        is_cpu = current_platform.is_cpu()
        if is_cpu != (model.device.type == "cpu"):
            raise VLLMStartError(
                f"this vLLM runs on {'a CPU' if is_cpu else 'a GPU'} and the policy is on {model.device}; "
                f"set device {'cpu' if is_cpu else 'cuda'}, or install the other vLLM"
            )
        name = type(model).__name__
        if name not in ModelRegistry.get_supported_archs():
            raise VLLMStartError(f"vLLM has no model class {name}; use rollout.engine builtin")
        if is_cpu:
            start_without_packing()
        try:
            llm = LLM(model=path, **options(model, settings, is_cpu=is_cpu))
        except Exception as error:  # vLLM raises every kind: what it says is all there is to know
            _forget_groups()
            raise VLLMStartError(_why(path, error, is_cpu=is_cpu)) from error
    try:
        _check_same(llm, model, tokenizer)
    except VLLMStartError:
        stop(llm)
        raise
    return llm


def options(model: PreTrainedModel, settings: Settings, *, is_cpu: bool) -> dict[str, Any]:
    """The keyword arguments of `LLM`."""
    context = context_length(model)
    cache = CPU_CACHE_GIB if settings.kv_cache_gib is None and is_cpu else settings.kv_cache_gib
    length = min(context, settings.max_model_len or context)
    found: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",  # of the distribution that a token was drawn from
        "enable_prefix_caching": True,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": settings.enforce_eager or is_cpu,
        "enable_sleep_mode": settings.sleep and not is_cpu,
        "trust_remote_code": settings.trust_remote_code,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "seed": 0,  # every request has a seed of its own
    }
    if cache is not None:
        found["kv_cache_memory_bytes"] = int(cache * GIB)
    if length < 2**31:  # a model without a limit: vLLM reads its configuration
        found["max_model_len"] = length
    if settings.max_num_seqs > LEAST_BATCHED_TOKENS:
        found["max_num_batched_tokens"] = settings.max_num_seqs
    if settings.lora_rank is not None:
        rank = next((each for each in LORA_RANKS if each >= settings.lora_rank), None)
        if rank is None:
            raise VLLMStartError(f"lora_r is {settings.lora_rank}, and vLLM has adapters up to {LORA_RANKS[-1]}")
        found |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
    return found


def stop(llm: Any) -> None:
    """End vLLM and give its memory back."""
    llm.llm_engine.engine_core.shutdown()
    _forget_groups()


def _check_same(llm: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Token ids mean the same on both sides."""
    theirs, ours = llm.llm_engine.model_config.get_vocab_size(), model.get_input_embeddings().num_embeddings
    if theirs != ours:
        raise VLLMStartError(f"vLLM's model has a vocabulary of {theirs} and the trainer's of {ours}; name one model")
    there, here = llm.get_tokenizer().get_vocab(), tokenizer.get_vocab()
    if there != here:
        token = min(token for token, _ in there.items() ^ here.items())
        raise VLLMStartError(
            f"vLLM's tokenizer differs from the trainer's: token {token!r} is {there.get(token)} there and "
            f"{here.get(token)} here; keep the tokenizer beside the model the same as the one that trains"
        )


def _why(path: str, error: Exception, *, is_cpu: bool) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    words = ("memory", "kv cache", "cache blocks")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error).lower() for word in words):
        remedy = "rollout.vllm.kv_cache_gib" if is_cpu else "rollout.vllm.gpu_memory_utilization"
        return f"vLLM has too little memory for {path}; change {remedy} or lower rollout.vllm.max_model_len: {said}"
    return f"vLLM could not start with {path}: {said}"


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keep what vLLM changes for a whole process: random state, warnings, `torch.set_num_threads` and its number."""
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)


def _forget_groups() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
