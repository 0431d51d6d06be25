"""`fastrl kernels check`: every op on every backend of this device, value and gradient, against float64.

The rule is that of the tests: an implementation may err as much as the specification does in the same precision, plus
a slack. Shapes are small on a CPU and real on a GPU. What agrees is timed, forward and backward, beside the bare
matrix products of the same inputs where there are such.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import (
    gae,
    group_advantage,
    linear_cross_entropy,
    linear_divergence,
    linear_logprob,
    linear_token_loss,
    linear_topk_divergence,
    logits_logprob,
    reverse_scan,
    token_objective,
)
from fastrl.ops.backend import BACKENDS
from fastrl.ops.layers import rms_norm, rotary, swiglu
from fastrl.ops.linear_topk_divergence import TopTokens
from fastrl.testing import ValueAndGrads, double, error, linear_logprob_inputs, magnitude, value_and_grads

SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3}  # of the largest true number, at least of 1
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one kind of input.

    Attributes:
        op: its name.
        call: (*inputs, backend=) -> tensors.
        inputs: (device, dtype) -> inputs; sizes depend on the device.
        differentiable: places of the inputs that get a gradient.
        dtypes: of the inputs.
        floor: inputs -> the matrix products that forward and backward make of them; None where there are none.
    """

    op: str
    call: Callable[..., Any]
    inputs: Callable[[str, torch.dtype], tuple[Any, ...]]
    differentiable: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    floor: Callable[..., object] | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """What one backend did on one case.

    Attributes:
        op: name of the op.
        backend: name of the backend.
        dtype: of the inputs.
        shapes: of the inputs.
        error: largest absolute error of the tensor that comes nearest to its limit; None when it cannot run here.
        allowed: that tensor's limit.
        milliseconds: of forward and backward, the median; None unless it agrees.
        floor_fraction: time of the bare matrix products over that time; None where there are no products.
        cannot_run: the reason; None when it ran.
        problem: disagreement or failure; None when it passes.
    """

    op: str
    backend: str
    dtype: str
    shapes: str
    error: float | None = None
    allowed: float | None = None
    milliseconds: float | None = None
    floor_fraction: float | None = None
    cannot_run: str | None = None
    problem: str | None = None


def check(device: str, cases: Sequence[Case] | None = None) -> Iterator[Checked]:
    """One record per op, dtype and backend, as they are made; `device` is "cpu" or "cuda", None means all CASES."""
    for case in CASES if cases is None else cases:
        for dtype in case.dtypes:
            inputs = case.inputs(device, dtype)
            run = partial(_run, case, inputs)
            naive, truth = run("reference"), _run(case, double(inputs), "reference")
            shapes = " ".join(str(list(x.shape)) for x in inputs if isinstance(x, Tensor)).replace(" ", "")
            floor = None if case.floor is None else _milliseconds(partial(case.floor, *inputs), device)
            for backend in BACKENDS[1:]:
                named = Checked(case.op, backend, str(dtype).removeprefix("torch."), shapes)
                judged = _judged(named, partial(run, backend), naive, truth, SLACK[dtype])
                if judged.error is not None and judged.problem is None:
                    spent = _milliseconds(partial(run, backend), device)
                    judged = replace(judged, milliseconds=spent, floor_fraction=floor and floor / spent)
                yield judged


def _run(case: Case, inputs: tuple[Any, ...], backend: str) -> ValueAndGrads:
    return value_and_grads(partial(case.call, backend=backend), *inputs, differentiable=case.differentiable)


def _milliseconds(run: Callable[[], object], device: str) -> float:
    """Median of a few calls after one that warms up."""
    spent = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spent[1:])


def _judged(
    named: Checked, run: Callable[[], ValueAndGrads], naive: ValueAndGrads, truth: ValueAndGrads, slack: float
) -> Checked:
    place = (named.op, named.backend, named.dtype, named.shapes)
    if named.backend == "triton" and named.dtype == "bfloat16" and os.environ.get("TRITON_INTERPRET") == "1":
        return Checked(*place, cannot_run="the interpreter truncates bfloat16 stores")
    try:
        got = run()
    except Exception as failure:  # one backend that fails must not hide what the others do
        reason = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
        cannot = str(failure).startswith(f"backend {named.backend!r} of ")
        return Checked(*place, cannot_run=str(failure)) if cannot else Checked(*place, problem=reason)
    found = []
    triples = zip(*((*x.values, *x.grads) for x in (naive, got, truth)), strict=True)
    for k, (a, b, exact) in enumerate(triples):
        if b.shape != exact.shape:
            return Checked(*place, problem=f"tensor {k} has shape {list(b.shape)}, expected {list(exact.shape)}")
        found.append((error(b, exact), error(a, exact) + slack * max(1.0, magnitude(exact))))
    worst, allowed = max(found, key=lambda pair: pair[0] / pair[1])
    return Checked(*place, error=worst, allowed=allowed, problem="disagrees" if worst > allowed else None)


# Inputs


def _head(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, d, v = (1937, 1024, 151936) if device == "cuda" else (7, 24, 509)
    hidden, weight, target = linear_logprob_inputs(n, d, v, dtype=dtype, device=device)
    target[1::5] = -100
    return hidden, weight, target


def _two_heads(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, _ = _head(device, dtype)
    return hidden, weight, hidden.flip(0), weight.roll(1, 1)


def _kept_tokens(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, and a teacher's ids, log-probabilities [N, 8] and tail [N]."""
    hidden, weight, target = _head(device, dtype)
    ids = (target[:, None] + 101 * torch.arange(8, device=device)) % len(weight)
    kept = torch.randn(len(hidden), 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1).to(device)
    return hidden, weight, ids, kept[:, :8].contiguous(), kept[:, 8].contiguous()


def _logits(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, v = (1937, 151936) if device == "cuda" else (7, 509)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, v, generator=generator).to(device, dtype), torch.arange(n, device=device) * 71 % v


def _columns(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """logprob, old, ref, advantage, weight, sampler, entropy; log-ratios are multiples of 1/64, off every border."""
    total = 1_048_577 if device == "cuda" else 257
    generator = torch.Generator().manual_seed(0)
    old = (-192 * torch.rand(total, generator=generator)).round() / 64
    logprob, ref, sampler = (old + (20 * torch.randn(total, generator=generator)).round() / 64 for _ in range(3))
    advantage, entropy = torch.randn(2, total, generator=generator)
    weight = (torch.arange(total) % 10 != 0).float()
    columns = (logprob, old, ref, advantage, weight, sampler, entropy)
    return tuple(x.to(device, dtype) for x in columns)


def _sequences(device: str) -> Tensor:
    lengths = [0, 1, 1023, 1024, 4097, 0] if device == "cuda" else [0, 1, 30, 17]
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _scan(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = _sequences(device)
    generator = torch.Generator().manual_seed(0)
    x, decay = torch.randn(2, int(cu_seqlens[-1]), generator=generator)
    return x.to(device, dtype), decay.tanh().to(device, dtype), cu_seqlens


def _rewards_and_values(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reward, value, cu_seqlens = _scan(device, dtype)
    return reward, value, cu_seqlens, torch.arange(reward.numel(), device=device) % 4 != 1


def _groups(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size, groups = (16384, 1024) if device == "cuda" else (24, 5)
    generator = torch.Generator().manual_seed(0)
    reward = 100 + torch.randint(3, (size,), generator=generator) / 8
    reward[::9] = torch.nan
    return reward.to(device, dtype), torch.randint(groups, (size,), generator=generator).to(device)


def _norm(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, width = (16_384, 1024) if device == "cuda" else (7, 33)
    x, weight = torch.randn(rows + 1, width, generator=torch.Generator().manual_seed(0)).split([rows, 1])
    return x.to(device, dtype), weight[0].to(device, dtype)


def _gate_and_up(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, width = (4096, 3072) if device == "cuda" else (7, 33)
    gate, up = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return gate, up


def _heads(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query, key, cos, sin."""
    rows, heads, width = (4096, 16, 128) if device == "cuda" else (7, 4, 6)
    x = torch.randn(rows, heads + heads // 2, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    angle = torch.outer(torch.arange(rows) % 1000, 10000.0 ** -torch.linspace(0, 1, width // 2))
    turned = torch.cat([angle, angle], dim=-1).to(device)
    query, key = x.split([heads, heads // 2], dim=1)
    return query.contiguous(), key.contiguous(), turned.cos().to(dtype), turned.sin().to(dtype)


# Calls


def _three_products(hidden: Tensor, weight: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


def _four_products(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> tuple[Tensor, ...]:
    return teacher_hidden @ teacher_weight.T, *_three_products(hidden, weight)


def _divergence(hidden: Tensor, weight: Tensor, *teacher: Tensor, backend: str) -> Tensor:
    return linear_divergence(hidden, weight, *teacher, beta=0.5, backend=backend).loss


def _topk_divergence(
    hidden: Tensor, weight: Tensor, ids: Tensor, logprob: Tensor, tail: Tensor, *, backend: str
) -> Tensor:
    return linear_topk_divergence(hidden, weight, TopTokens(ids, logprob, tail), backend=backend).loss


def _token_loss(hidden: Tensor, weight: Tensor, target: Tensor, *, backend: str) -> Tensor:
    def loss_fn(logprob: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        return -logprob.clamp(min=-9.0) * (rows % 3 - 1) - 0.01 * entropy

    return linear_token_loss(hidden, weight, target, loss_fn, backend=backend).loss


def _objective(
    logprob: Tensor,
    old: Tensor,
    ref: Tensor,
    advantage: Tensor,
    weight: Tensor,
    sampler: Tensor,
    entropy: Tensor,
    *,
    backend: str,
) -> tuple[Tensor, ...]:
    got = token_objective(
        logprob,
        old,
        ref,
        advantage,
        weight,
        clip_high=0.28,
        dual_clip=3.0,
        kl_coef=0.05,
        sampler_logprob=sampler,
        entropy=entropy,
        entropy_coef=0.01,
        backend=backend,
    )
    return got.loss, got.d_logprob, got.ratio, got.kl


HEAD_DTYPES = (torch.float32, torch.bfloat16)
HEAD = (_head, (0, 1), HEAD_DTYPES, _three_products)
CASES = (
    Case("linear_logprob", partial(linear_logprob, temperature=0.7), *HEAD),
    Case("linear_token_loss", _token_loss, *HEAD),
    Case("linear_cross_entropy", partial(linear_cross_entropy, label_smoothing=0.1), *HEAD),
    Case("linear_divergence", _divergence, _two_heads, (0, 1), HEAD_DTYPES, _four_products),
    Case("linear_topk_divergence", _topk_divergence, _kept_tokens, (0, 1), HEAD_DTYPES, _three_products),
    Case("logits_logprob", partial(logits_logprob, temperature=0.7), _logits, (0,), HEAD_DTYPES),
    Case("token_objective", _objective, _columns, (0, 6)),
    Case("group_advantage", group_advantage, _groups, ()),
    Case("reverse_scan", reverse_scan, _scan, (0, 1)),
    Case("gae", gae, _rewards_and_values, ()),
    Case("rms_norm", partial(rms_norm, epsilon=1e-6), _norm, (0, 1), HEAD_DTYPES),
    Case("swiglu", swiglu, _gate_and_up, (0, 1), HEAD_DTYPES),
    Case("rotary", rotary, _heads, (0, 1), HEAD_DTYPES),
)
