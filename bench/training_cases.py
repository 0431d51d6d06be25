"""The steps that `bench.training_step` takes: models of real shapes, completions of lognormal lengths, rewards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from fastrl.algorithms.presets import dapo
from fastrl.plan.lengths import Lengths
from fastrl.plan.shape import SHAPES, ModelShape
from fastrl.plan.workload import Workload
from fastrl.train.lora import add_lora, is_of_adapter
from fastrl.train.model import make_packed
from fastrl.types import Rollout

SEED = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a step.

    Attributes:
        shape: of the model.
        prompts, generations: groups, and completions of each.
        lengths: of prompts and completions.
        without_signal: share of the groups whose rewards are all equal.
        micro_tokens: most tokens of a micro-batch.
        lora_r: rank of an adapter over the frozen model; 0 trains all weights.
    """

    shape: ModelShape
    prompts: int
    generations: int
    lengths: Lengths
    without_signal: float = 0.3
    micro_tokens: int = 16_384
    lora_r: int = 0


def _gpu(
    name: str, context: int, prompts: int, generations: int = 8, micro_tokens: int = 16_384, lora_r: int = 0
) -> Case:
    lengths = Lengths(prompt=200, median=400, longest=context - 200)
    return Case(SHAPES[name], prompts, generations, lengths, micro_tokens=micro_tokens, lora_r=lora_r)


SMALL = ModelShape(
    hidden=256, layers=4, heads=8, kv_heads=4, head_dim=32, intermediate=768, vocab=8192, tied=True, qk_norm=True
)
GPU_CASES = {
    "qwen3-0.6b, 16k tokens": _gpu("qwen3-0.6b", 2048, 3),
    "qwen3-0.6b, 2k": _gpu("qwen3-0.6b", 2048, 16),
    "qwen3-1.7b, 2k": _gpu("qwen3-1.7b", 2048, 16),
    "qwen3-4b, 2k": _gpu("qwen3-4b", 2048, 8, micro_tokens=4096),
    # All weights and their optimizer's state would be 135 GiB, more than one processor has.
    "llama-3-8b, 2k, LoRA": _gpu("llama-3-8b", 2048, 8, micro_tokens=8192, lora_r=32),
    "qwen3-0.6b, 8k, G=16": _gpu("qwen3-0.6b", 8192, 8, 16),
    "qwen3-1.7b, 16k, G=16": _gpu("qwen3-1.7b", 16_384, 8, 16),
}
_SHORT = Lengths(prompt=24, median=60, longest=232)
CPU_CASES = {
    "D=256, 4 layers, V=8192": Case(SMALL, 4, 8, _SHORT, 0.25, 1024),
    "D=256, 4 layers, V=512": Case(replace(SMALL, vocab=512), 4, 8, _SHORT, 0.25, 1024),
    "D=256, 4 layers, V=8192, LoRA": Case(
        replace(SMALL, qk_norm=False, tied=False), 4, 8, _SHORT, 0.25, 1024, lora_r=16
    ),
    "D=128, 2 layers, long": Case(
        replace(SMALL, hidden=128, layers=2, heads=4, kv_heads=2, intermediate=384, vocab=4096),
        2,
        8,
        Lengths(prompt=24, median=200, longest=1000),
        0.0,
        2048,
    ),
}

QUICK = ("D=256, 4 layers, V=8192", "D=128, 2 layers, long")


@dataclass(frozen=True, slots=True)
class Replay:
    """The rollouts of a step and what was made of their rewards."""

    rollouts: list[Rollout]
    advantage: torch.Tensor
    group: torch.Tensor


def random_model(
    shape: ModelShape, lengths: Lengths, *, dtype: torch.dtype, device: str, lora_r: int = 0
) -> PreTrainedModel:
    """A model of that shape with random weights, ready for packed batches."""
    model = plain_model(shape, lengths, dtype=dtype, device=device, lora_r=lora_r)
    make_packed(model, device=device, attn_implementation="auto", gradient_checkpointing=False)
    return model


def plain_model(
    shape: ModelShape, lengths: Lengths, *, dtype: torch.dtype, device: str, lora_r: int = 0
) -> PreTrainedModel:
    """The same weights in transformers' own model: a Qwen3 where queries and keys are normalised, else a Llama."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": lengths.prompt + lengths.longest,
        "tie_word_embeddings": shape.tied,
    }
    torch.manual_seed(SEED)
    with torch.device(device):
        model: PreTrainedModel = (
            Qwen3ForCausalLM(Qwen3Config(**sizes)) if shape.qk_norm else LlamaForCausalLM(LlamaConfig(**sizes))
        ).to(dtype)
    if lora_r > 0:
        _adapt(model, lora_r)
    return model


@torch.no_grad()
def _adapt(model: PreTrainedModel, r: int) -> None:
    """An adapter as it is after some training: B is not zero, or A would have no gradient to compare."""
    add_lora(model, r=r, alpha=2 * r, seed=SEED)
    for name, parameter in model.named_parameters():
        if is_of_adapter(name) and "lora_B" in name:
            parameter.normal_(std=0.02)


def replayed(case: Case) -> Replay:
    """Completions of the lengths' quantiles in shuffled order, random tokens, rewards of 0 and 1."""
    generator = torch.Generator().manual_seed(SEED)
    count = case.prompts * case.generations
    quantiles = case.lengths.completions()
    picked = [quantiles[(2 * i + 1) * len(quantiles) // (2 * count)] for i in range(count)]
    order = torch.randperm(count, generator=generator).tolist()
    rollouts: list[Rollout] = []
    prompt: tuple[int, ...] = ()
    for place in order:
        if len(rollouts) % case.generations == 0:
            prompt = tuple(torch.randint(case.shape.vocab, (case.lengths.prompt,), generator=generator).tolist())
        n = max(1, round(picked[place]))
        completion = tuple(torch.randint(case.shape.vocab, (n,), generator=generator).tolist())
        rollouts.append(Rollout(prompt, completion, (0.0,) * n, "stop", 0))
    group = torch.arange(count) // case.generations
    reward = (torch.arange(count) % 2).float()
    flat = group < round(case.without_signal * case.prompts)
    reward[flat] = 1.0
    return Replay(rollouts, dapo().advantage(reward, group), group)


def workload(case: Case) -> Workload:
    """The case in the cost model's words."""
    groups = round(case.without_signal * case.prompts)
    return Workload(
        shape=case.shape,
        lengths=case.lengths,
        prompts=case.prompts,
        generations=case.generations,
        without_signal=groups / case.prompts,
        micro_tokens=case.micro_tokens,
        lora_r=case.lora_r,
    )


def sizes(case: Case) -> dict[str, float]:
    """The case's numbers, for its records."""
    shape = {name: getattr(case.shape, name) for name in ("hidden", "layers", "intermediate", "vocab")}
    step = {
        name: getattr(case, name) for name in ("prompts", "generations", "without_signal", "micro_tokens", "lora_r")
    }
    return {
        **shape,
        **step,
        "prompt": case.lengths.prompt,
        "median": case.lengths.median,
        "longest": case.lengths.longest,
    }
