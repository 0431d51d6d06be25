"""What the children of `bench.gpu_session` do, item by item, most telling first.

Everything is imported when its item is reached: a machine that lacks a package loses the items that need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

# Row and shape of the benchmarks, by what a reader would ask first; the others follow in the registry's order.
FIRST = (
    ("linear_token_loss", "qwen3-8b"),
    ("linear_token_loss_masked", "qwen3-8b"),
    ("linear_token_loss", "qwen3-0.6b"),
    ("training_step", "qwen3-0.6b, 16k tokens"),
    ("linear_logprob", "qwen3-8b"),
    ("linear_cross_entropy", "qwen3-8b"),
    ("linear_token_loss_peaked", "qwen3-8b"),
    ("supervised_step", "sft, qwen3-0.6b, 2k"),
    ("training_step", "llama-3-8b, 2k, LoRA"),
    ("token_objective", "1M tokens"),
    ("group_advantage", "1024 x 16"),
    ("linear_token_loss", "llama3-8b"),
    ("linear_logprob", "qwen3-0.6b"),
    ("reverse_scan", "16 x 8192"),
    ("gae", "16 x 8192"),
    ("rollout", "30M, 64 tokens or EOS"),
)
# Beside the registry's rows: they take whole steps, and their cases are models.
PROGRAMS = ("training_step", "supervised_step", "rollout")
DRY = (
    ("group_advantage", None),
    ("token_objective", None),
    ("training_step", "D=256, 4 layers, V=512"),
    ("supervised_step", "sft, D=256, V=512"),
    ("rollout", "tiny, 20 tokens each"),
)
STEP_SECONDS = 40.0  # of a case's timed turns

Records = Iterator[dict[str, Any]]


def work(stage: str, device: str) -> Iterator[tuple[str, Records]]:
    """Name of each item of a stage and its records, made when they are asked for."""
    if stage == "check":
        from fastrl.command.kernel_check import CASES, check

        for case in CASES:
            yield case.op, (asdict(record) for record in check(device, [case]))
    elif stage == "bench":
        for row, label in ordered(device):
            yield f"{row} {label}", bench_records(row, label, device)
    else:
        from bench.tune import JOBS, timed

        for job in JOBS:
            yield job.name, timed(job, device, small=device == "cpu")


def ordered(device: str) -> list[tuple[str, str]]:
    """Row and case of every benchmark of the session; on a CPU a few small ones of each kind."""
    from bench.registry import all_rows

    rows = all_rows()
    if device == "cpu":
        return [(name, label or next(iter(rows[name].quick_shapes))) for name, label in DRY]
    known = [(name, label) for name in PROGRAMS for label in _labels(name)]
    known += [(name, label) for name, row in rows.items() for label in row.shapes]
    return [pair for pair in FIRST if pair in known] + [pair for pair in known if pair not in FIRST]


def bench_records(name: str, label: str, device: str) -> Records:
    """One record per contender; fewer repeats than the programs themselves take."""
    from bench.__main__ import provenance

    origin = provenance(device, quick=True)
    find = _of_program if name in PROGRAMS else _of_row
    try:
        for record in find(name, label, device):
            yield {"row": name, **record, **origin}
    except ImportError as missing:  # the wheels were not brought
        yield {"row": name, "shape": {"name": label}, "contender": "fastrl", "cannot_run": str(missing), **origin}


def _of_row(name: str, label: str, device: str) -> Records:
    import torch

    from bench.__main__ import measured
    from bench.registry import all_rows

    row = all_rows()[name]
    shape = (row.quick_shapes if device == "cpu" else row.shapes)[label]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for record in measured(row, shape, dtype=dtype, device=device, quick=True):
        yield {"shape": {"name": label, "sizes": shape}, **record}


def _of_program(name: str, label: str, device: str) -> Records:
    program = _program(name)
    case = (program.CPU_CASES if device == "cpu" else program.GPU_CASES)[label]
    repeats = 2 if device == "cpu" else 5
    for record in program.measured(case, device=device, repeats=repeats, seconds=STEP_SECONDS):
        yield {"shape": {"name": label, "sizes": program.sizes(case)}, **record}


def _labels(name: str) -> list[str]:
    """A program's cases; where a package that it needs is missing those that will say so."""
    try:
        return list(_program(name).GPU_CASES)
    except ImportError:
        return [label for program, label in FIRST if program == name]


def _program(name: str) -> Any:
    """Each has CPU_CASES, GPU_CASES, sizes(case) and measured(case, device=, repeats=, seconds=)."""
    return import_module(f"bench.{name}")
