"""`fastrl plan`: what a step of a model on a GPU costs by arithmetic, before anything is rented."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fastrl.command.settings import Refused
from fastrl.plan.communication import transfers
from fastrl.plan.cost import mfu, step_seconds, training_terms
from fastrl.plan.layers import BFLOAT16, LAYERS, LayerCost
from fastrl.plan.lengths import Lengths
from fastrl.plan.machine import GIB, MACHINES, Machine, machine_of
from fastrl.plan.memory import largest_micro_batch, training_memory
from fastrl.plan.rollout import most_sequences, rollout_seconds
from fastrl.plan.shape import SHAPES, shape_of
from fastrl.plan.workload import Workload

MOST_COMPLETIONS = 1_000_000  # each is played through
MOST_LORA = 32  # the rank that is advised where all weights do not fit


def run(arguments: Sequence[str]) -> int:
    """Print the plan that the arguments ask for.

    Raises:
        Refused: a model or a machine that is not known, or numbers that describe no step.
    """
    options = _parser().parse_args(list(arguments))
    try:
        machine = machine_of(options.gpu)
        layer = LAYERS[options.layers]
        plans = [plan(_workload(options), machine, ranks=ranks, layer=layer) for ranks in options.gpus]
    except ValueError as error:
        raise Refused(f"fastrl plan: {error}") from None
    if options.json:
        print(json.dumps(plans, indent=1))
    else:
        print(_text(plans, machine))
    return 0


def plan(work: Workload, machine: Machine, *, ranks: int, layer: LayerCost = BFLOAT16) -> dict[str, Any]:
    """All figures of one step on `ranks` processors, each with the whole model and its own share of the prompts.

    With several ranks the optimizer's state is shared out. Nothing of the communication is assumed to overlap.

    Args:
        layer: what a layer costs beside its products.

    Raises:
        ValueError: what cannot fit.
    """
    terms = training_terms(work, layer)
    training = step_seconds(terms, machine)
    memory = training_memory(work, layer, ranks=ranks)
    largest = largest_micro_batch(work, machine.memory, layer, ranks=ranks)
    if largest == 0:
        short = sum(training_memory(replace(work, micro_tokens=1024), layer, ranks=ranks).values()) / GIB
        raise ValueError(
            f"{short:.0f} GiB are needed on {'one GPU' if ranks == 1 else f'each of {ranks} GPUs'} with 1,024 tokens "
            f"and {machine.name} has {machine.memory / GIB:.0f}: take {_remedies(work, machine, layer, ranks)}"
        )
    occupied = memory["weights, gradients"] + memory["optimizer state"] + memory["reference"]
    together = min(work.completions, most_sequences(work, machine, occupied=occupied))
    sampling = rollout_seconds(work, machine, sequences=together)
    sent = transfers(work, machine, ranks=ranks, shards_optimizer=ranks > 1)
    total = training + sampling + sum(transfer.seconds for transfer in sent)
    return {
        "machine": machine.name,
        "gpus": ranks,
        "parameters": work.shape.parameters,
        "tokens_per_step": work.sampled_tokens * ranks,
        "training": {term.name: 1e3 * term.seconds(machine) for term in terms},
        "training_ms": 1e3 * training,
        "mfu": mfu(work, training, machine),
        "rollout_ms": 1e3 * sampling,
        "sequences_together": together,
        "transfers": [asdict(transfer) for transfer in sent],
        "step_ms": 1e3 * total,
        "tokens_per_second": work.sampled_tokens * ranks / total,
        "memory_gib": {name: size / GIB for name, size in memory.items()},
        "peak_gib": sum(memory.values()) / GIB,
        "fits": sum(memory.values()) <= machine.memory,
        "largest_micro_batch": largest,
    }


def _remedies(work: Workload, machine: Machine, layer: LayerCost, ranks: int) -> str:
    """What would make it fit, of the command's own options."""
    thinner = replace(work, lora_r=min(work.lora_r or MOST_LORA, MOST_LORA))
    saving = replace(work, checkpointing=True)
    both = replace(thinner, checkpointing=True)
    lora = f"--lora_r {MOST_LORA}"
    larger = sorted((other.memory, name) for name, other in MACHINES.items() if other.memory > machine.memory)
    # Of each kind the first that helps.
    kinds: list[list[tuple[str, Workload, float, int]]] = [
        [("--checkpointing", saving, machine.memory, ranks)],
        [(lora, thinner, machine.memory, ranks), (f"--checkpointing with {lora}", both, machine.memory, ranks)],
        [(f"--gpus {n}", work, machine.memory, n) for n in (2, 4, 8, 64) if n > ranks],
        [(f"--gpu {name}", work, memory, ranks) for memory, name in larger],
    ]
    found = [
        next((name for name, asked, memory, n in kind if largest_micro_batch(asked, memory, layer, ranks=n)), None)
        for kind in kinds
    ]
    return " or ".join([*filter(None, found), "a smaller model"])


def _workload(options: argparse.Namespace) -> Workload:
    for name in ("prompts", "generations", "prompt_tokens", "median", "context", "micro_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.prompts * options.generations > MOST_COMPLETIONS:
        raise ValueError(
            f"--prompts {options.prompts} times --generations {options.generations} are too many completions for one "
            f"GPU's step; plan at most {MOST_COMPLETIONS:,}"
        )
    if not 0 <= options.without_signal < 1:
        raise ValueError(f"--without_signal must be in [0, 1), got {options.without_signal}")
    if options.lora_r < 0:
        raise ValueError(f"--lora_r must be at least 0 (0 trains all weights), got {options.lora_r}")
    if options.prompt_tokens >= options.context:
        raise ValueError(
            f"--context {options.context} leaves no room after --prompt_tokens {options.prompt_tokens}: take a longer "
            "context or fewer prompt tokens"
        )
    if min(options.gpus) < 1:
        raise ValueError(f"--gpus must be at least 1, got {min(options.gpus)}")
    return Workload(
        shape=shape_of(options.model),
        lengths=Lengths(
            prompt=options.prompt_tokens,
            median=options.median,
            longest=options.context - options.prompt_tokens,
        ),
        prompts=options.prompts,
        generations=options.generations,
        without_signal=options.without_signal,
        micro_tokens=options.micro_tokens,
        checkpointing=options.checkpointing,
        has_reference=options.reference,
        old_passes=options.old_passes,
        lora_r=options.lora_r,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrl plan",
        description="Time, memory and largest micro-batch of a GRPO step by arithmetic; docs/plan.md has the formulas "
        "and where they were compared with measurements.",
    )
    add = parser.add_argument
    add("--model", required=True, help=f"directory with a config.json, or one of {', '.join(SHAPES)}")
    add("--gpu", default="h200", help=f"one of {', '.join(MACHINES)}")
    add("--gpus", type=int, nargs="+", default=[1], help="one plan for each number of GPUs")
    add("--context", type=int, default=2048, help="most tokens of prompt and completion")
    add("--prompt_tokens", type=int, default=200)
    add("--median", type=int, default=400, help="median tokens of a completion (lognormal, sigma 0.8)")
    add("--prompts", type=int, default=16, help="groups of one GPU's step")
    add("--generations", type=int, default=8, help="completions of a group")
    add("--without_signal", type=float, default=0.0, help="share of the completions with advantage 0")
    add("--micro_tokens", type=int, default=16_384, help="packing.token_budget")
    add("--layers", choices=tuple(LAYERS), default="transformers", help="kernels.layers")
    add("--checkpointing", action="store_true", help="keep only each layer's input for the backward pass")
    add("--reference", action="store_true", help="a KL to a frozen reference")
    add("--old_passes", type=int, choices=(0, 1), default=0, help="1 with several updates for each batch")
    add("--lora_r", type=int, default=0, help="rank of adapters of all linear layers; 0 trains all weights")
    add("--json", action="store_true")
    return parser


def _text(plans: Sequence[dict[str, Any]], machine: Machine) -> str:
    first = plans[0]
    lines = [
        f"{first['parameters'] / 1e9:.2f} billion parameters on {machine.name}: calculated, not measured",
        f"({machine.source})",
        "",
    ]
    lines += [f"  {name:52}{ms:10.1f} ms" for name, ms in first["training"].items() if ms]
    lines.append(f"  {'training step':52}{first['training_ms']:10.1f} ms   {first['mfu']:.0%} MFU")
    together = f"{first['sequences_together']} sequences at once"
    lines += [f"  {'rollout (vLLM, same GPUs)':52}{first['rollout_ms']:10.1f} ms   {together}", ""]
    lines += [f"  {name:52}{gib:10.2f} GiB" for name, gib in first["memory_gib"].items() if gib]
    verdict = "fits" if first["fits"] else f"DOES NOT FIT: take --micro_tokens {first['largest_micro_batch']}"
    lines.append(f"  {'training peak':52}{first['peak_gib']:10.2f} GiB  of {machine.memory / GIB:.0f}: {verdict}")
    lines += [f"  {'largest packing.token_budget that fits':52}{first['largest_micro_batch']:10,}", ""]
    lines.append(f"  {'GPUs':>6}{'step s':>10}{'tokens/s':>14}{'sent by each GPU':>20}{'of the step':>14}")
    for found in plans:
        sent = sum(each["bytes"] for each in found["transfers"]) / GIB
        share = 1e3 * sum(each["seconds"] for each in found["transfers"]) / found["step_ms"]
        lines.append(
            f"  {found['gpus']:>6}{found['step_ms'] / 1e3:>10.2f}{found['tokens_per_second']:>14,.0f}"
            f"{sent:>16.2f} GiB{share:>14.0%}"
        )
    return "\n".join(lines)
