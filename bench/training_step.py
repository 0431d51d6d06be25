"""The training half of a GRPO step on replayed completions: `python -m bench.training_step [CASE ...]`.

Random weights of real shapes, completions of lognormal lengths, rewards with groups that have no signal. Every
contender takes the same optimizer step from the same rollouts, rewards and advantages, in turns; the learning rate is
0, so that all of them see the same weights for ever. The ablations leave out one thing each:

    no packing        one sequence in a micro-batch
    eager head        N x V logits and autograd
    no skipping       completions with advantage 0 go through the model too

and on a GPU one puts something in: "triton layers" runs `kernels.layers: triton` on the same weights. Where TRL is
installed its GRPO trainer takes the step too: see `bench.trl_contender`.

Loss and gradient norm must agree before anything is timed. `predicted_ms` is what `fastrl plan`'s cost model says of
the same step: of a GPU from its data in `fastrl.plan.machine`, of another machine from operators timed just before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.__main__ import ROOT, provenance
from bench.this_machine import measured_machine
from bench.trl_contender import NAMES, trl_steps
from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.algorithms.presets import dapo
from fastrl.plan.cost import CHUNK_BYTES, mfu, step_seconds, training_terms
from fastrl.plan.layers import BFLOAT16, NATIVE_FLOAT32, TRITON_BFLOAT16
from fastrl.plan.lengths import Lengths
from fastrl.plan.machine import MACHINES, Machine
from fastrl.plan.memory import training_memory
from fastrl.plan.shape import SHAPES, ModelShape
from fastrl.plan.workload import Workload
from fastrl.testing import MemoryMeter
from fastrl.train.config import KernelsBlock, SFTConfig
from fastrl.train.model import make_packed
from fastrl.train.native_layers import use_triton_layers
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.prepare import StepSequences, prepare, step_sequences
from fastrl.train.update import policy_batch_loss, update
from fastrl.types import Rollout, TokenBatch

SEED = 0
DEFAULT = KernelsBlock()
CPU_CHUNK = 2 << 20  # fastrl.ops.head's, for float32 logits of a chunk on a CPU
AGREE = 2e-3  # relative, of loss and gradient norm; bfloat16 sums in another order
TRITON = "triton layers"
AGREE_TRITON = 2e-2  # they round once where transformers' layers round two or three times


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a step.

    Attributes:
        shape: of the model.
        prompts, generations: groups, and completions of each.
        lengths: of prompts and completions.
        without_signal: share of the groups whose rewards are all equal.
        micro_tokens: most tokens of a micro-batch.
    """

    shape: ModelShape
    prompts: int
    generations: int
    lengths: Lengths
    without_signal: float = 0.3
    micro_tokens: int = 16_384


def _gpu(name: str, context: int, prompts: int, generations: int = 8, micro_tokens: int = 16_384) -> Case:
    lengths = Lengths(prompt=200, median=400, longest=context - 200)
    return Case(SHAPES[name], prompts, generations, lengths, micro_tokens=micro_tokens)


SMALL = ModelShape(
    hidden=256, layers=4, heads=8, kv_heads=4, head_dim=32, intermediate=768, vocab=8192, tied=True, qk_norm=True
)
GPU_CASES = {
    "qwen3-0.6b, 16k tokens": _gpu("qwen3-0.6b", 2048, 3),
    "qwen3-0.6b, 2k": _gpu("qwen3-0.6b", 2048, 16),
    "qwen3-1.7b, 2k": _gpu("qwen3-1.7b", 2048, 16),
    "qwen3-4b, 2k": _gpu("qwen3-4b", 2048, 8, micro_tokens=8192),
    "qwen3-0.6b, 8k, G=16": _gpu("qwen3-0.6b", 8192, 8, 16),
    "qwen3-1.7b, 16k, G=16": _gpu("qwen3-1.7b", 16_384, 8, 16),
}
CPU_CASES = {
    "D=256, 4 layers, V=8192": Case(SMALL, 4, 8, Lengths(prompt=24, median=60, longest=232), 0.25, 1024),
    "D=256, 4 layers, V=512": Case(
        replace(SMALL, vocab=512), 4, 8, Lengths(prompt=24, median=60, longest=232), 0.25, 1024
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


def main() -> None:
    """Run the cases named on the command line, all of the machine's kind by default."""
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    options = _options(list(cases))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    origin = provenance(device, quick=options.quick)
    path = options.results / f"training_step.{device}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for name in options.cases or (QUICK if options.quick and device == "cpu" else cases):
            print(f"\n{name}", flush=True)
            for record in measured(cases[name], device=device, repeats=3 if options.quick else 9):
                print(_line(record), flush=True)
                shape = {"name": name, "sizes": sizes(cases[name])}
                file.write(json.dumps({"row": "training_step", "shape": shape, **record, **origin}) + "\n")
                file.flush()


def measured(case: Case, *, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One record per contender that agrees with the first; of another one, why it was not timed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(case.shape, case.lengths, dtype=dtype, device=device)
    optimizer = MasterAdamW(model)
    replay = replayed(case)
    steps = contenders(case, model, optimizer, replay)
    steps |= trl_steps(case, replay, partial(plain_model, case.shape, case.lengths, dtype=dtype, device=device))
    if device == "cuda":
        steps[TRITON] = partial(_in_triton, model, steps["fastrl"])
    absent = {} if "TRL" in steps else {"TRL": "trl is not installed"}
    reasons = {**check(steps), **absent}
    times = timed(steps, repeats, device)
    work = workload(case)
    machine = _machine(case, dtype, device)
    layer = BFLOAT16 if dtype == torch.bfloat16 else NATIVE_FLOAT32
    chunk = CHUNK_BYTES if device == "cuda" else CPU_CHUNK
    predicted = {}
    for name, each in (("fastrl", layer), (TRITON, TRITON_BFLOAT16)):
        ms = 1e3 * step_seconds(training_terms(work, each, chunk_bytes=chunk), machine)
        activations = training_memory(work, each, chunk_bytes=chunk)["activations"]
        predicted[name] = {"predicted_ms": ms, "predicted_gib": activations / 2**30}
    tokens = sum(len(each.prompt_ids) + len(each.completion_ids) for each in replay.rollouts)
    for name, samples in times.items():
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        ms = statistics.median(samples)
        yield {
            "contender": name,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": ms,
            "ms_p10": deciles[0],
            "ms_p90": deciles[-1],
            "repeats": len(samples),
            "tokens_per_second": 1e3 * tokens / ms,
            "mfu": mfu(work, ms / 1e3, machine),
            "peak_gib": peak_gib(steps[name], optimizer, device),
            **predicted.get(name, {}),
        }
    yield from ({"contender": name, "not_timed": reason} for name, reason in reasons.items())


def check(steps: dict[str, Callable[[], dict[str, float]]]) -> dict[str, str]:
    """Run every contender once; TRL and Triton's layers leave `steps` when they fail or compute something else.

    Returns:
        Why, for each that left.

    Raises:
        RuntimeError: one of the others computes something else than the first.
    """
    truth: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, step in list(steps.items()):
        try:
            found = step()
            truth = truth or found
            allowed = AGREE_TRITON if name == TRITON else AGREE
            for key in ("loss", "grad_norm"):
                if not abs(found[key] - truth[key]) <= allowed * max(1e-3, abs(truth[key])):
                    raise RuntimeError(f"{name} has {key} {found[key]}, the first contender has {truth[key]}")
        except Exception as failure:
            if name not in (TRITON, *NAMES):
                raise
            reasons[name] = f"{type(failure).__name__}: {failure}"
            del steps[name]
    return reasons


def _in_triton(model: PreTrainedModel, step: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A step with Triton layers, and the model's own again after it: a second model would need its own memory."""
    kinds = [(module, type(module)) for module in model.modules()]
    use_triton_layers(model)
    try:
        return step()
    finally:
        for module, kind in kinds:
            module.__class__ = kind


def random_model(shape: ModelShape, lengths: Lengths, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Qwen3 of that shape with random weights, ready for packed batches."""
    model = plain_model(shape, lengths, dtype=dtype, device=device)
    make_packed(model, device=device, attn_implementation="auto", gradient_checkpointing=False)
    return model


def plain_model(shape: ModelShape, lengths: Lengths, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The same weights in transformers' own model."""
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=lengths.prompt + lengths.longest,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype)


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


def contenders(
    case: Case, model: PreTrainedModel, optimizer: MasterAdamW, replay: Replay
) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> one optimizer step from the rollouts; returns its metrics."""
    longest = case.lengths.prompt + case.lengths.longest
    one = partial(_step, case, model, optimizer, replay)
    return (
        {
            "fastrl": one,
            "no packing": partial(one, is_packed=False),
            "eager head": partial(one, kernels=KernelsBlock(backend="reference")),
            "no skipping": partial(one, skips=False),
            "no sharing": partial(one, shares=False),
            "none of these": partial(one, is_packed=False, kernels=KernelsBlock(backend="reference"), skips=False),
        }
        if longest <= case.micro_tokens
        else {"fastrl": one}
    )


def _step(
    case: Case,
    model: PreTrainedModel,
    optimizer: MasterAdamW,
    replay: Replay,
    *,
    is_packed: bool = True,
    kernels: KernelsBlock = DEFAULT,
    skips: bool = True,
    shares: bool = True,
) -> dict[str, float]:
    algorithm = dapo()
    everything = torch.ones(len(replay.rollouts), dtype=torch.bool)
    step = step_sequences(
        algorithm if skips else replace(algorithm, entropy_coef=1e-30),  # a bonus of nothing: all have a signal
        replay.rollouts,
        replay.advantage,
        replay.group,
        is_judged=everything,
        is_kept=everything,
        keep_denominator=False,
    )
    batches = (
        _batches(case, algorithm, model, step, kernels)
        if is_packed
        else [
            batch
            for each in step.sequences
            for batch in _batches(case, algorithm, model, replace(step, sequences=[each]), kernels)
        ]
    )
    if not shares:
        batches = [replace(batch, shared=None) for batch in batches]
    loss = policy_batch_loss(model, algorithm, kernels, temperature=1.0)
    config = SFTConfig(model_name_or_path="", output_dir="", train_dataset="", max_grad_norm=1.0)
    return update(optimizer, loss, batches, config, lr=0.0, step=1)


def _batches(
    case: Case, algorithm: PolicyGradient, model: PreTrainedModel, step: StepSequences, kernels: KernelsBlock
) -> list[TokenBatch]:
    return prepare(
        algorithm,
        step,
        model=model,
        reference=None,
        temperature=1.0,
        token_budget=case.micro_tokens,
        kernels=kernels,
        needs_old=False,
    )


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
    )


def _machine(case: Case, dtype: torch.dtype, device: str) -> Machine:
    known = [
        each for name, each in MACHINES.items() if device == "cuda" and name in torch.cuda.get_device_name().lower()
    ]
    if known:
        return known[0]
    work = workload(case)
    share = min(1.0, case.micro_tokens / work.tokens)
    return measured_machine(
        case.shape,
        tokens=round(work.tokens * share),
        head_rows=round(work.head_rows * share),
        sequence=round(case.lengths.prompt + case.lengths.mean()),
        dtype=dtype,
        device=device,
    )


def timed(steps: dict[str, Callable[[], dict[str, float]]], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each contender, every one first in turn."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in range(repeats):
        for name in (*names[repeat % len(names) :], *names[: repeat % len(names)]):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            steps[name]()  # its metrics come to the host, which waits for the device
            samples[name].append(1e3 * (time.perf_counter() - started))
    return samples


def peak_gib(step: Callable[[], dict[str, float]], optimizer: MasterAdamW, device: str) -> float:
    """Most memory alive above weights and optimizer state during a step."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before) / 2**30
    with MemoryMeter(*optimizer.state_dict().values()) as meter:
        step()
    return float(meter.peak_bytes) / 2**30


def sizes(case: Case) -> dict[str, float]:
    """The case's numbers, for its records."""
    shape = {name: getattr(case.shape, name) for name in ("hidden", "layers", "intermediate", "vocab")}
    step = {name: getattr(case, name) for name in ("prompts", "generations", "without_signal", "micro_tokens")}
    return {
        **shape,
        **step,
        "prompt": case.lengths.prompt,
        "median": case.lengths.median,
        "longest": case.lengths.longest,
    }


def _line(record: dict[str, Any]) -> str:
    if "not_timed" in record:
        return f"  {record['contender']:20}  not timed: {record['not_timed']}"
    predicted = f"  predicted {record['predicted_ms']:.0f} ms" if "predicted_ms" in record else ""
    return (
        f"  {record['contender']:20}{record['ms']:10.1f} ms{record['tokens_per_second']:12,.0f} tokens/s"
        f"{record['mfu']:8.1%} MFU{record['peak_gib']:10.3f} GiB{predicted}"
    )


def _options(cases: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {'; '.join(cases)}")
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 9, and on a CPU two cases")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    unknown = [name for name in options.cases if name not in cases]
    if unknown:
        parser.error(f"no case is called {unknown[0]!r}; there are {'; '.join(cases)}")
    return options


if __name__ == "__main__":
    main()
