"""The nested blocks that several recipes share: what is ours and not TRL's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.train.config.vllm import VLLMBlock
from fastrl.train.config.vllm_server import ServerBlock


@dataclass(frozen=True, kw_only=True)
class DataBlock:
    """How rows become token sequences.

    Attributes:
        columns: new name -> name in the file, applied before anything else (`{prompt: question}`).
        prompt_template: Python format string over the row's columns that makes the prompt, for rows without one.
        completion_template: the same for the completion (SFT).
        system_prompt: put before the first message of each conversation.
        chat_template: a file with a Jinja template that replaces the tokenizer's.
        apply_chat_template: render plain prompts as one user message too.
        max_rows: use only the first rows of the file.
        skip_bad_rows: write refused rows to `rejected.jsonl` in output_dir and go on.
    """

    columns: dict[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    completion_template: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    apply_chat_template: bool = False
    max_rows: int | None = None
    skip_bad_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class PackingBlock:
    """How sequences are cut into micro-batches. It changes speed and memory, never the result.

    Attributes:
        token_budget: most tokens of one packed micro-batch.
    """

    token_budget: int = 8192


@dataclass(frozen=True, kw_only=True)
class RolloutBlock:
    """How completions are sampled.

    Attributes:
        engine: "builtin" needs nothing else; "vllm" is much faster on a GPU, and runs beside the trainer;
            "vllm_server" is the same in processes of its own, on this machine or others.
        batch_size: most prompts decoded together.
        max_prompt_length: prompts with more tokens are refused; None allows what the model's context holds.
        vllm: how vLLM runs beside the trainer.
        server: how vLLM servers are started or reached.
        max_staleness: most versions of the weights between those that sample a round and those that learn from it
            first: 0 samples and learns in turns, k samples up to k rounds ahead (docs/asynchronous.md).
        segment_tokens: with max_staleness, sample completions this many tokens at a time and take in the newest weights
            between segments; None finishes a round with the weights that began it.
        timeout_seconds: with max_staleness, a call of the engine in its own process that takes longer has hung; the
            process is started again and the call's completions are lost.
    """

    engine: Literal["builtin", "vllm", "vllm_server"] = "builtin"
    batch_size: int = 256
    max_prompt_length: int | None = None
    vllm: VLLMBlock = VLLMBlock()
    server: ServerBlock = ServerBlock()
    max_staleness: int = 0
    segment_tokens: int | None = None
    timeout_seconds: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class RewardsBlock:
    """How rewards run; see docs/rewards.md.

    Attributes:
        workers: reward processes that use a core at a time; None is one per core, 0 runs every reward in the
            trainer's own process, where nothing stops one that hangs.
        spare_workers: further ones that may wait for something (a server, a time limit) at the same time.
        timeout_seconds: for judging one completion.
        max_error_rate: share of a step's completions that a reward may fail on; three steps in a row above it stop
            the run. 1 never does.
        cache_size: results of pure rewards that are kept.
    """

    workers: int | None = None
    spare_workers: int = 32
    timeout_seconds: float = 10.0
    max_error_rate: float = 0.02
    cache_size: int = 65536


@dataclass(frozen=True, kw_only=True)
class KernelsBlock:
    """Which implementation of the ops and of the layers' small operators runs.

    Attributes:
        backend: "torch", "native" or "triton" for all that is computed over the head; None lets each op choose.
        chunk_rows: rows of the head's logits alive at once; None chooses by a memory budget.
        skip_tolerance: share of the gradient that certified skipping may leave out; 0 is exact.
        layers: "triton" runs norms, rotations and the feed-forward product of Llama, Qwen2 and Qwen3 as one kernel
            each on a GPU, in the models that train, in their reference, and in PPO's reward model. "transformers" keeps
            its code there; on a CPU float32 layers run natively where fastrl._C is built.
    """

    backend: Literal["reference", "torch", "triton"] | None = None
    chunk_rows: int | None = None
    skip_tolerance: float = 0.0
    layers: Literal["transformers", "triton"] = "transformers"


@dataclass(frozen=True, kw_only=True)
class ReportBlock:
    """What a run shows.

    Attributes:
        panel: draw the live terminal panel when the output is a terminal.
        log_completions: rollouts per logged step written to completions.jsonl.
        to: extra trackers.
    """

    panel: bool = True
    log_completions: int = 4
    to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
