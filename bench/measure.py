"""How contenders are judged and timed: accuracy first, then interleaved repeats, then peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.registry import Compiled, Row, Shape
from fastrl.testing import MemoryMeter, ValueAndGrads, double, error, magnitude, value_and_grads

L2_BYTES = 256 << 20  # written between repeats on a GPU, so that no contender finds its inputs in cache
UNTIMED_CALLS = {"cpu": 0, "cuda": 2}  # after the first, which has grown the heap: the allocator and clocks
FLOOR = "floor"


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of forward plus backward in milliseconds, and memory above the inputs.

    Attributes:
        ms: median of the repeats; first and last decile beside it.
        cold_ms: the first call of all, compilation and autotuning included.
        peak_gib: most memory alive above the inputs; None where it cannot be seen (a compiled function on the CPU).
        reserved_gib: what the allocator held for it; None on a CPU.
    """

    ms: float
    ms_p10: float
    ms_p90: float
    repeats: int
    cold_ms: float
    peak_gib: float | None
    reserved_gib: float | None


def relative_error(got: ValueAndGrads, truth: ValueAndGrads) -> float:
    """Largest error of any value or gradient, relative to that tensor's largest true magnitude (at least 1)."""
    pairs = zip((*got.values, *got.grads), (*truth.values, *truth.grads), strict=True)
    return max((error(a, exact) / max(1.0, magnitude(exact)) for a, exact in pairs), default=0.0)


def disagreements(row: Row, shape: Shape, *, dtype: torch.dtype, device: str) -> dict[str, float | str]:
    """Error of every contender against the float64 specification, or the sentence that says why it cannot run."""
    if row.check_rows is not None:
        shape = (min(shape[0], row.check_rows), *shape[1:])
    inputs = row.make_inputs(*shape, dtype=dtype, device=device)
    truth = value_and_grads(row.spec, *double(inputs), differentiable=row.differentiable)
    errors: dict[str, float | str] = {}
    for name, contender in row.contenders.items():
        try:
            got = value_and_grads(contender, *inputs, differentiable=row.differentiable)
        except Exception as reason:  # other packages' functions raise what they like
            errors[name] = _sentence(reason)
        else:
            errors[name] = relative_error(got, truth)
    return errors


def step(
    function: Callable[..., Any], inputs: Sequence[Any], differentiable: Sequence[int] | None
) -> Callable[[], None]:
    """A call without arguments that runs forward and, where something is differentiable, backward from ones."""
    chosen = range(len(inputs)) if differentiable is None else differentiable
    wanted = {i for i in chosen if isinstance(inputs[i], Tensor) and inputs[i].is_floating_point()}
    leaves = [x.detach().requires_grad_(i in wanted) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
    sources = [leaves[i] for i in sorted(wanted)]

    def run() -> None:
        outputs = function(*leaves)
        roots = [y for y in ((outputs,) if isinstance(outputs, Tensor) else outputs) if y.requires_grad]
        if roots and sources:
            torch.autograd.grad(roots, sources, [torch.ones_like(y) for y in roots], allow_unused=True)

    return run


def timings(
    row: Row, names: Sequence[str], inputs: Sequence[Any], *, device: str, repeats: int, seconds: float
) -> dict[str, Timing | str]:
    """Time the named contenders `repeats` times in turn, fewer when all together would take longer than `seconds`.

    Returns:
        Timings by name, with the row's floor, where it has one, under `FLOOR`; a sentence for what fails at the
        full size, such as for want of memory.
    """
    calls = {name: step(row.contenders[name], inputs, row.differentiable) for name in names}
    if row.floor is not None:
        calls[FLOOR] = step(row.floor, inputs, ())
    failed: dict[str, Timing | str] = {}
    cold: dict[str, float] = {}
    for name, call in calls.items():
        try:
            cold[name] = _milliseconds(call, device)
            for _ in range(UNTIMED_CALLS[device]):
                call()
        except Exception as reason:  # checked on few rows: these may be too many for it, or of another number
            failed[name] = _sentence(reason)
    names = [name for name in calls if name not in failed]
    flushed = torch.empty(L2_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + seconds
    for repeat in range(repeats):
        # Every contender goes first in turn: what runs before leaves the clock, the cache and the heap as it likes.
        for name in (*names[repeat % len(names) :], *names[: repeat % len(names)]):
            flushed.zero_()
            samples[name].append(_milliseconds(calls[name], device))
        if repeat >= 2 and time.perf_counter() > stop:
            break
    return failed | {
        name: _timing(samples[name], cold[name], _peak(row, name, calls[name], device, inputs)) for name in names
    }


def _sentence(reason: Exception) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]


def _milliseconds(call: Callable[[], None], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _timing(samples: list[float], cold: float, peak: tuple[float | None, float | None]) -> Timing:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples), cold, *peak)


def _peak(
    row: Row, name: str, call: Callable[[], None], device: str, inputs: Sequence[Any]
) -> tuple[float | None, float | None]:
    """Most memory alive above the inputs during one call, and most that the allocator held above what it had, GiB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        call()
        torch.cuda.synchronize()
        peak, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - held
        return peak / 2**30, reserved / 2**30
    if name != FLOOR and isinstance(row.contenders[name], Compiled):
        return None, None  # it runs as plain operators while a dispatch mode watches, so its memory cannot be seen
    with MemoryMeter(*(x for x in inputs if isinstance(x, Tensor))) as meter:
        call()
    return meter.peak_bytes / 2**30, None
