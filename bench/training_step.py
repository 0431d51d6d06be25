"""The training half of a GRPO step on replayed completions: `python -m bench.training_step [CASE ...]`.

Random weights of real shapes, completions of lognormal lengths, rewards with groups that have no signal. Every
contender takes the same optimizer step from the same rollouts, rewards and advantages, in turns; the learning rate is
0, so that all of them see the same weights for ever. The ablations leave out one thing each:

    no packing        one sequence in a micro-batch
    eager head        N x V logits and autograd
    no skipping       completions with advantage 0 go through the model too
    no sharing        a group's prompt goes through the model once for each completion
    none of these     without the first three, and so without sharing

and on a GPU one puts something in: "triton layers" runs `kernels.layers: triton` on the same weights. Where TRL is
installed its GRPO trainer takes the step too: see `bench.trl_contender`.

Loss and gradient norm must agree before anything is timed. `predicted_ms` is what `fastrl plan`'s cost model says of
the same step: of a GPU from its data in `fastrl.plan.machine`, of another machine from operators timed just before.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from bench.__main__ import ROOT, provenance
from bench.records import put
from bench.this_machine import measured_machine
from bench.training_cases import (
    CPU_CASES,
    GPU_CASES,
    QUICK,
    Case,
    Replay,
    plain_model,
    random_model,
    replayed,
    sizes,
    workload,
)
from bench.trl_contender import trl_steps
from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.algorithms.presets import dapo
from fastrl.plan.cost import CHUNK_BYTES, mfu, step_seconds, training_terms
from fastrl.plan.layers import BFLOAT16, NATIVE_FLOAT32, TRITON_BFLOAT16
from fastrl.plan.machine import MACHINES, Machine
from fastrl.plan.memory import training_memory
from fastrl.testing import MemoryMeter
from fastrl.train.config import KernelsBlock, SFTConfig
from fastrl.train.native_layers import use_triton_layers
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.prepare import StepSequences, prepare, step_sequences
from fastrl.train.update import policy_batch_loss, update
from fastrl.types import TokenBatch

Steps = dict[str, Callable[[], dict[str, float]]]
DEFAULT = KernelsBlock()
CPU_CHUNK = 2 << 20  # fastrl.ops.head's, for float32 logits of a chunk on a CPU
# Relative, of loss and gradient norm. A peer's norm of bfloat16 gradients is a bfloat16 number, which is 2e-3 away at
# worst, and gradients of bfloat16 logits are another 1e-3 away from those of float32 logits.
AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
GRADIENT_BYTES = 4  # of a parameter, in float32
TRITON = "triton layers"
AGREE_TRITON = 2e-2  # they round once where transformers' layers round two or three times


def main() -> None:
    """Run the cases named on the command line, all of the machine's kind by default."""
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    options = _options(list(cases))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    origin = provenance(device, quick=options.quick)
    path = options.results / f"training_step.{device}.jsonl"
    for name in options.cases or (QUICK if options.quick and device == "cpu" else cases):
        print(f"\n{name}", flush=True)
        place = {"row": "training_step", "shape": {"name": name, "sizes": sizes(cases[name])}}
        found = []
        for record in measured(cases[name], device=device, repeats=3 if options.quick else 9):
            print(_line(record), flush=True)
            found.append({**place, **record, **origin})
        put(path, found)


def measured(case: Case, *, device: str, repeats: int, seconds: float = float("inf")) -> Iterator[dict[str, Any]]:
    """One record per contender that agrees with the first; of another one, why it was not timed.

    Args:
        seconds: after which no further turn of all contenders begins; two are taken in any case.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sized: dict[str, Any] = {
        "shape": case.shape,
        "lengths": case.lengths,
        "dtype": dtype,
        "device": device,
        "lora_r": case.lora_r,
    }
    model = random_model(**sized)
    optimizer = MasterAdamW(model)
    replay = replayed(case)
    steps = contenders(case, model, optimizer, replay)
    peers, reasons = added(lambda: trl_steps(case, replay, partial(plain_model, **sized)))
    steps |= peers
    if device == "cuda":
        steps[TRITON] = partial(_in_triton, model, steps["fastrl"])
    reasons |= check(steps, AGREE[dtype])
    times = timed(steps, repeats, device, seconds, reasons)
    work = workload(case)
    machine = _machine(case, dtype, device)
    layer = BFLOAT16 if dtype == torch.bfloat16 else NATIVE_FLOAT32
    chunk = CHUNK_BYTES if device == "cuda" else CPU_CHUNK
    predicted = {}
    for name, each in (("fastrl", layer), (TRITON, TRITON_BFLOAT16)):
        ms = 1e3 * step_seconds(training_terms(work, each, chunk_bytes=chunk), machine)
        memory = training_memory(work, each, chunk_bytes=chunk)
        # What a step makes: activations, the head's chunks, and gradients, which the plan counts with the weights.
        made = memory["activations"] + memory["head"] + float(GRADIENT_BYTES) * work.trainable
        predicted[name] = {"predicted_ms": ms, "predicted_peak_gib": made / 2**30}
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
            "peak_gib": peak_gib(steps[name], device),
            **predicted.get(name, {}),
        }
    dtype_name = str(dtype).removeprefix("torch.")
    yield from ({"contender": name, "dtype": dtype_name, "not_timed": reason} for name, reason in reasons.items())


def added(make: Callable[[], Steps]) -> tuple[Steps, dict[str, str]]:
    """TRL's contenders as `make` gives them, and the reason where it gives none: the others are measured without."""
    try:
        found = make()
    except Exception as failure:  # an import inside TRL may raise anything
        return {}, {"TRL": f"{type(failure).__name__}: {failure}"}
    return found, {} if found else {"TRL": "trl is not installed"}


def check(steps: Steps, allowed: float) -> dict[str, str]:
    """Run every contender once; those that fail or compute something else than the first leave `steps`.

    Args:
        allowed: relative difference of loss and gradient norm; Triton's layers have AGREE_TRITON at least.

    Returns:
        Why, for each that left.
    """
    truth: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, step in list(steps.items()):
        try:
            found = step()
            print(f"  checked: {name}", file=sys.stderr, flush=True)
            truth = truth or found
            most = max(allowed, AGREE_TRITON) if name == TRITON else allowed
            for key in ("loss", "grad_norm"):
                if not abs(found[key] - truth[key]) <= most * max(1e-3, abs(truth[key])):
                    raise RuntimeError(f"{name} has {key} {found[key]}, the first contender has {truth[key]}")
        except Exception as failure:
            if not truth:
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


def contenders(case: Case, model: PreTrainedModel, optimizer: MasterAdamW, replay: Replay) -> Steps:
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


def timed(steps: Steps, repeats: int, device: str, seconds: float, reasons: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of each contender, every one first in turn.

    Args:
        seconds: as in `measured`.
        reasons: gets those that run out of memory in their turn; they are no longer timed, the others are.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for repeat in range(repeats):
        if repeat >= 2 and time.perf_counter() > end:
            break
        print(f"  turn {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        names = list(samples)
        for name in (*names[repeat % len(names) :], *names[: repeat % len(names)]):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            try:
                steps[name]()  # its metrics come to the host, which waits for the device
            except torch.OutOfMemoryError as failure:
                if name == next(iter(steps)):
                    raise
                reasons[name] = f"{type(failure).__name__}: {failure}"
                del samples[name]
                continue
            samples[name].append(1e3 * (time.perf_counter() - started))
    return samples


def peak_gib(step: Callable[[], dict[str, float]], device: str) -> float:
    """Most memory alive during a step above what is alive before it: weights, optimizer state, other contenders."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before) / 2**30
    # By exact type: `isinstance` would ask objects that answer with warnings, and a compiler's tensors have no storage.
    with MemoryMeter(*(each for each in gc.get_objects() if type(each) in (Tensor, Parameter))) as meter:
        step()
    return float(meter.peak_bytes) / 2**30


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
