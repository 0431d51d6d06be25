"""Which tile of a kernel is fastest on this GPU: every candidate timed, for `bench/gpu_session.py`.

A job is one kernel at one shape. The winner of each job belongs into the tables of kernels/ by hand, with its record.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch

HEADS = ((4096, 151936), (1024, 151936), (4096, 128256), (2048, 151936), (3584, 152064))  # D, V; the best known first
VOCABULARIES = (151936, 128256, 50257)
ROWS = 4096  # a chunk of the waist
REPEATS = 15
SECONDS = 0.4  # of one candidate, after its compilation


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel at one shape.

    Attributes:
        kernel: file of kernels/.
        shape: what the winner is keyed on besides the architecture.
        candidates: (device, small) -> the candidates' names and calls; `small` is for a trial on a CPU.
    """

    kernel: str
    shape: Mapping[str, int]
    candidates: Callable[[str, bool], Mapping[str, Callable[[], object]]]

    @property
    def name(self) -> str:
        """ "token_stats V=151936"."""
        return " ".join([self.kernel, *(f"{axis}={size}" for axis, size in self.shape.items())])


def timed(job: Job, device: str, *, small: bool) -> Iterator[dict[str, Any]]:
    """One record per candidate: its median in milliseconds, or why it cannot run."""
    for name, call in job.candidates(device, small).items():
        record = {"kernel": job.kernel, "shape": dict(job.shape), "candidate": name}
        try:
            yield {**record, "milliseconds": _median(call, device)}
        except Exception as failure:  # too much shared memory, say: the next candidate may fit
            yield {**record, "failed": f"{type(failure).__name__}: {str(failure).strip().splitlines()[:1]}"}


def best(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fastest candidate of each (architecture, kernel, shape), with all times beside it."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if "milliseconds" not in record:
            continue
        shape = " ".join(f"{axis}={size}" for axis, size in record["shape"].items())
        entry = found.setdefault(f"{record['architecture']} {record['kernel']} {shape}", {"milliseconds": {}})
        entry["milliseconds"][record["candidate"]] = round(record["milliseconds"], 5)
    for entry in found.values():
        entry["best"] = min(entry["milliseconds"], key=entry["milliseconds"].__getitem__)
    return found


def _median(call: Callable[[], object], device: str) -> float:
    for _ in range(2):  # compilation, then allocator and cache
        call()
    samples: list[float] = []
    stop = time.perf_counter() + SECONDS
    while len(samples) < REPEATS and (len(samples) < 3 or time.perf_counter() < stop):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


# Candidates


def _objective(device: str, small: bool) -> dict[str, Callable[[], object]]:
    from fastrl.kernels import token_objective as kernel

    total = 100 if small else 1 << 20
    columns = [torch.randn(total, device=device) for _ in range(7)]
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "delta": inf, "kl": 3}
    options |= {"kl_gradient": 2, "kl_coef": 0.05, "correction_cap": 2.0, "correction_low": 0.0}
    options |= {"correction_high": inf, "entropy_coef": 0.01, "log_ratio_clamp": 20.0}
    return {str(tile): partial(kernel.forward, *columns, **options, tile=tile) for tile in kernel.TILES}


def _sequences(device: str, small: bool, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = 32 if small else 1 << 17
    borders = torch.arange(0, total + 1, 8 if small else longest, dtype=torch.int32, device=device)
    return torch.randn(total, device=device), torch.rand(total, device=device), borders


def _scan(device: str, small: bool, *, longest: int) -> dict[str, Callable[[], object]]:
    from fastrl.kernels import reverse_scan as kernel

    x, decay, borders = _sequences(device, small, longest)

    def both(tile: tuple[int, int]) -> None:
        y = kernel.forward(x, decay, borders, tile=tile)
        kernel.backward(x, decay, borders, y, True, tile=tile)

    return {str(tile): partial(both, tile) for tile in kernel.TILES}


def _gae(device: str, small: bool, *, longest: int) -> dict[str, Callable[[], object]]:
    from fastrl.kernels import gae as kernel
    from fastrl.kernels.reverse_scan import TILES

    reward, value, borders = _sequences(device, small, longest)
    columns = (reward, value, borders, value > 0.25, 0.99, 0.95, True)
    return {str(tile): partial(kernel.forward, *columns, tile=tile) for tile in TILES}


def _groups(device: str, small: bool, *, size: int) -> dict[str, Callable[[], object]]:
    from fastrl.kernels import group_advantage as kernel

    total = 16 if small else 1 << 14
    group = torch.randperm(total, device=device) // min(size, total)
    reward = torch.rand(total, device=device)
    return {str(tile): partial(kernel.forward, reward, group, 1, 1, 1, 1e-4, tile=tile) for tile in kernel.TILES}


def _logits(device: str, small: bool, v: int) -> tuple[torch.Tensor, torch.Tensor]:
    n, v = (3, 300) if small else (ROWS, v)
    return torch.randn(n, v, device=device), torch.randint(v, (n,), device=device)


def _row_tiles(small: bool) -> list[Any]:
    from fastrl.kernels.tuning import RowTile

    if small:
        return [RowTile(128, 4, 1)]
    shapes = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 16))
    return [RowTile(block, warps, prefetch) for prefetch in (1, 2) for block, warps in shapes]


def _stats(device: str, small: bool, *, v: int) -> dict[str, Callable[[], object]]:
    from fastrl.kernels import token_stats as kernel
    from fastrl.kernels.logit_map import map_arguments

    raw, target = _logits(device, small, v)
    plain = map_arguments(1.0, None, 1.0, torch.float32)
    return {str(tuple(x)): partial(kernel.forward, raw, target, plain, tile=x) for x in _row_tiles(small)}


def _gradient(device: str, small: bool, *, v: int) -> dict[str, Callable[[], object]]:
    from fastrl.kernels import token_gradient, token_stats
    from fastrl.kernels.logit_map import map_arguments

    raw, target = _logits(device, small, v)
    plain = map_arguments(1.0, None, 1.0, torch.float32)
    logprob, entropy, lse = token_stats.forward(raw, target, plain).unbind(0)
    stats = (logprob, entropy, lse)
    out = torch.empty(raw.shape, dtype=torch.bfloat16, device=device)
    arguments = (raw, out, None, target, stats, (torch.ones_like(stats[0]), None, None, None), plain)
    return {str(tuple(x)): partial(token_gradient.backward, *arguments, tile=x) for x in _row_tiles(small)}


def _product(device: str, small: bool, *, d: int, v: int) -> dict[str, Callable[[], object]]:
    """The fused product's tiles, and what they must beat: the vendor's product and a pass over its logits."""
    from fastrl.kernels import linear_stats, token_stats
    from fastrl.kernels.logit_map import map_arguments
    from fastrl.kernels.tuning import ProductTile

    n, d, v = (16, 32, 200) if small else (ROWS, d, v)
    dtype = torch.float32 if small else torch.bfloat16
    hidden, weight = torch.randn(n, d, device=device, dtype=dtype), torch.randn(v, d, device=device, dtype=dtype)
    target = torch.randint(v, (n,), device=device)
    plain = map_arguments(1.0, None, 1.0, torch.float32)

    def vendor() -> None:
        if small:
            logits = hidden @ weight.T
        else:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        token_stats.forward(logits, target, plain)

    tiles = [(16, 128, 16, 2, 4, 1)]
    if not small:
        tiles = [(128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 4, 4)]
        tiles += [(256, 128, 64, 8, 8, 3), (64, 256, 64, 8, 8, 4), (128, 256, 64, 16, 8, 3), (128, 128, 128, 8, 8, 3)]
    fused = {
        str(tile): partial(linear_stats.forward, hidden, weight, None, target, plain, tile=ProductTile(*tile))
        for tile in tiles
    }
    return {"vendor product, token_stats": vendor, **fused}


JOBS = (
    *(Job("linear_stats", {"D": d, "V": v}, partial(_product, d=d, v=v)) for d, v in HEADS[:2]),
    *(Job("token_stats", {"V": v}, partial(_stats, v=v)) for v in VOCABULARIES[:1]),
    *(Job("token_gradient", {"V": v}, partial(_gradient, v=v)) for v in VOCABULARIES[:1]),
    Job("token_objective", {"T": 1 << 20}, _objective),
    *(Job("reverse_scan", {"longest": n}, partial(_scan, longest=n)) for n in (8192, 1024)),
    *(Job("gae", {"longest": n}, partial(_gae, longest=n)) for n in (8192, 1024)),
    *(Job("group_advantage", {"G": g}, partial(_groups, size=g)) for g in (16, 1 << 14)),
    *(Job("linear_stats", {"D": d, "V": v}, partial(_product, d=d, v=v)) for d, v in HEADS[2:]),
    *(Job("token_stats", {"V": v}, partial(_stats, v=v)) for v in VOCABULARIES[1:]),
    *(Job("token_gradient", {"V": v}, partial(_gradient, v=v)) for v in VOCABULARIES[1:]),
)
