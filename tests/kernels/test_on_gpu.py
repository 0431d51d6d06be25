"""What only a GPU shows, at sizes of real batches; the same bodies run interpreted on a CPU, at sizes that fit it."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import triton

from fastrl.command.kernel_check import CASES, check
from fastrl.ops import (
    gae,
    group_advantage,
    linear_cross_entropy,
    linear_logprob,
    linear_token_loss,
    logits_logprob,
    reverse_scan,
    token_objective,
)
from fastrl.ops.layers import rms_norm, rotary, swiglu
from fastrl.ops.linear_logprob import reference
from fastrl.testing import MemoryMeter, linear_logprob_inputs

TRITON = {"backend": "triton"}


def on(cpu: tuple, cuda: tuple) -> pytest.MarkDecorator:
    """Parametrizes a body over ("device", sizes): small on the CPU, real on a GPU."""
    return pytest.mark.parametrize(
        ("device", "sizes"), [pytest.param("cpu", cpu, id="cpu"), pytest.param("cuda", cuda, id="cuda", marks=GPU)]
    )


GPU = pytest.mark.gpu


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_every_op_agrees_with_float64_on_every_backend_of_a_gpu(case):
    records = list(check("cuda", [case]))
    assert [record for record in records if record.problem] == []
    ran = {record.backend for record in records if record.error is not None}
    triton_exists = not any("does not exist" in (x.cannot_run or "") for x in records if x.backend == "triton")
    assert ran >= {"torch", *(["triton"] if triton_exists else [])}


def nll(logprob, entropy, rows):
    return -logprob


@on(cpu=(64, 8, 300, 32), cuda=(65536, 128, 151936, 16384))
def test_a_whole_batch_through_the_head_has_the_rows_it_has_alone(device, sizes):
    n, d, v, chunk_rows = sizes  # on the GPU a chunk's logits alone are 2.5e9 numbers
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, weight, target = (
        x.requires_grad_(x.dtype == dtype) for x in linear_logprob_inputs(n, d, v, dtype=dtype, device=device)
    )
    result = linear_token_loss(hidden, weight, target, nll, chunk_rows=chunk_rows, **TRITON)
    d_hidden, d_weight = torch.autograd.grad(result.loss, (hidden, weight))
    rows = torch.tensor([0, 1, chunk_rows - 1, chunk_rows, n // 2, n - 2, n - 1], device=device)
    few = hidden.detach()[rows].double().requires_grad_()
    truth = reference(few, weight.detach().double(), target[rows])
    (d_few,) = torch.autograd.grad(-truth.logprob.sum(), few)
    for got, exact in zip(result.stats, truth, strict=True):
        torch.testing.assert_close(got[rows].double(), exact.detach(), rtol=1e-4, atol=1e-4)
    slack = 5e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(d_hidden[rows].double(), d_few, rtol=slack, atol=slack)
    # Each row's d logits sum to 0 over the tokens, and so do the columns of d weight: a lost or doubled tile shows.
    scale = d_weight.double().abs().sum(0)
    assert (d_weight.double().sum(0).abs() <= slack * scale).all()


@on(cpu=(40, 300), cuda=(65536, 151936))
@pytest.mark.parametrize("in_chunks", [False, True])
def test_logits_of_a_whole_batch_are_addressed_past_two_to_the_31(device, sizes, in_chunks):
    n, v = sizes  # 1e10 numbers on the GPU: 20 GB in bf16, and as much for their gradient
    logits = torch.zeros(n, v, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    rows = torch.tensor([0, n // 3, n - 1], device=device)
    logits[rows, 7] = 12.0
    logits.requires_grad_()
    target = torch.full((n,), 7, device=device)
    stats = logits_logprob(logits, target, chunk_rows=n // 7 if in_chunks else n, **TRITON)
    lse = math.log(v - 1 + math.exp(12))
    assert stats.logprob[rows].tolist() == pytest.approx([12 - lse] * 3, abs=1e-4)
    assert stats.logprob[[1, n - 2]].tolist() == pytest.approx([-math.log(v)] * 2, abs=1e-4)
    (grad,) = torch.autograd.grad(stats.logprob[rows].sum(), logits)
    expected = torch.full((v,), -math.exp(-lse), dtype=torch.float64)
    expected[7] = 1 - math.exp(12 - lse)
    for row in rows.tolist():
        torch.testing.assert_close(grad[row].double().cpu(), expected, rtol=1e-2, atol=1e-9)
    assert not grad[[1, n - 2]].any()


def extra_bytes(run: Callable[[], object], device: str, *inputs: torch.Tensor) -> int:
    """Most bytes alive at once beside the inputs."""
    if device == "cpu":
        with MemoryMeter(*inputs) as meter:
            run()
        return meter.peak_bytes
    run()  # compiles, and makes the vendor's workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


@on(cpu=(96, 16, 509, 8), cuda=(8192, 1024, 151936, 1024))
@pytest.mark.parametrize("op", ["token_loss", "cross_entropy", "logprob"])
def test_memory_is_that_of_chunks_and_of_the_gradients(op, device, sizes):
    n, d, v, chunk_rows = sizes
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, weight, target = (
        x.requires_grad_(x.dtype == dtype) for x in linear_logprob_inputs(n, d, v, dtype=dtype, device=device)
    )
    run = {
        "token_loss": lambda: linear_token_loss(hidden, weight, target, nll, chunk_rows=chunk_rows, **TRITON).loss,
        "cross_entropy": lambda: linear_cross_entropy(hidden, weight, target, chunk_rows=chunk_rows, **TRITON),
        "logprob": lambda: linear_logprob(
            hidden, weight, target, cache_gib=0.0, chunk_rows=chunk_rows, **TRITON
        ).logprob.sum(),
    }[op]
    used = extra_bytes(lambda: torch.autograd.grad(run(), (hidden, weight)), device, hidden, weight, target)
    # Three chunks of logits; d weight and d hidden summed in f32, copied once in backward and once more to their type.
    allowed = 4 * (3 * chunk_rows * v + 3 * (v * d + n * d)) + 64 * n
    assert used <= allowed + (64 << 20 if device == "cuda" else 1 << 16)
    assert used < 4 * n * v  # the logits that were never whole


@on(cpu=(40, 24), cuda=(1_100_000, 2048))
def test_rows_of_a_layer_are_addressed_past_two_to_the_31(device, sizes):
    n, width = sizes  # 2.25e9 numbers on the GPU, 4.5 GB each in bf16
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.zeros(n, width, dtype=dtype, device=device)
    x[-1, 0] = 8.0
    weight = torch.ones(width, dtype=dtype, device=device)
    # The root mean square of one 8 among zeros is 8 / sqrt(width).
    assert float(rms_norm(x, weight, epsilon=1e-9, **TRITON)[-1, 0]) == pytest.approx(width**0.5, rel=4e-3)
    assert float(swiglu(x, x, **TRITON)[-1, 0]) == pytest.approx(64 / (1 + math.exp(-8)), rel=4e-3)
    angles = torch.ones(n, 8, dtype=dtype, device=device)
    heads = x.view(n, -1, 8)
    turned, _ = rotary(heads, heads[:, :1], angles, angles, **TRITON)
    assert turned[-1, 0].tolist() == [8, 0, 0, 0, 8, 0, 0, 0]


@on(cpu=(33, 24), cuda=(16_384, 1024))
def test_the_weight_gradient_of_a_norm_has_the_same_bits_every_time(device, sizes):
    x, weight, dy = (torch.randn(shape, device=device) for shape in (sizes, sizes[1:], sizes))
    weight.requires_grad_()
    grads = [torch.autograd.grad(rms_norm(x, weight, epsilon=1e-6, **TRITON), weight, dy)[0] for _ in range(3)]
    assert all(torch.equal(grads[0], grad) for grad in grads)
    exact = (dy * x * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).sum(0)
    torch.testing.assert_close(grads[0].double(), exact, rtol=1e-5, atol=1e-3)


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Names of the kernels Triton compiles, or takes from its cache on disk, inside the block; none interpreted."""
    names: list[str] = []

    def hook(*, fn, is_manual_warmup=False, already_compiled=False, **_):
        names.append(fn.name)

    before, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, hook
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def step_of(length: int, v: int, device: str, *, chunk_rows: int | None = None) -> None:
    """Every kernel once, forward and backward, on `length` tokens."""
    hidden, weight, target = linear_logprob_inputs(length, 16, v, device=device)
    hidden.requires_grad_()
    stats = linear_logprob(hidden, weight, target, chunk_rows=chunk_rows, **TRITON)
    (stats.logprob + stats.entropy).sum().backward()
    linear_token_loss(hidden, weight, target, nll, chunk_rows=chunk_rows, **TRITON).loss.backward()
    logits = torch.zeros(length, v, device=device, requires_grad=True)
    logits_logprob(logits, target, chunk_rows=chunk_rows, **TRITON).logprob.sum().backward()
    x = torch.zeros(length, device=device)
    ones = torch.ones_like(x)
    logprob = x.clone().requires_grad_()
    token_objective(logprob, x, x, ones, ones, kl_coef=0.1, **TRITON).loss.sum().backward()
    borders = torch.tensor([0, length // 3, length], dtype=torch.int32, device=device)
    decay = ones.clone().requires_grad_()
    reverse_scan(x, decay, borders, **TRITON).sum().backward()
    gae(x, x, borders, ones.bool(), gamma=0.99, lam=0.95, **TRITON)
    group_advantage(x, torch.arange(length, device=device) % 5, **TRITON)
    rms_norm(hidden, weight[0], epsilon=1e-6, **TRITON).sum().backward()
    swiglu(hidden, hidden.detach(), **TRITON).sum().backward()
    query = hidden.view(length, 2, 8)
    sum(y.sum() for y in rotary(query, query[:, :1], *hidden.detach().view(2, length, 8), **TRITON)).backward()


@on(cpu=(3, 24, 130), cuda=(100, 8000, 50257))
def test_a_hundred_lengths_compile_a_handful_of_kernels(device, sizes):
    lengths, longest, v = sizes
    # What Triton tells apart: 1, multiples of 16 and the rest, and the kernels' own steps, which double.
    steps = [1, *(x for k in range(1, longest.bit_length()) for x in (2**k, 2**k + 1)), longest // 16 * 16, longest - 1]
    with counted_compilations() as first:
        for length in steps:
            step_of(length, v, device, chunk_rows=length // 3 + 1)
    draw = random.Random(0)
    with counted_compilations() as later:
        for _ in range(lengths):
            length = draw.randint(2, longest)
            step_of(length, v, device, chunk_rows=length // 3 + 1)
    assert later == []
    most = max((first.count(name) for name in first), default=0)
    assert most <= 6, sorted((first.count(name), name) for name in set(first))


@contextmanager
def syncs(device: str, mode: str) -> Iterator[list[str]]:
    """Refuses ("error") or records ("warn") what waits for the device inside the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: list[str] = []
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            yield found
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            found += [str(x.message) for x in caught if "called a synchronizing" in str(x.message)]


@on(cpu=(40, 16, 300), cuda=(4096, 1024, 50257))
def test_the_hot_path_does_not_wait_for_the_device(device, sizes):
    n, d, v = sizes
    hidden, weight, target = linear_logprob_inputs(n, d, v, device=device)
    hidden.requires_grad_()
    logits = torch.zeros(n, v, device=device, requires_grad=True)
    x, ones = torch.zeros(n, device=device), torch.ones(n, device=device)
    logprob = x.clone().requires_grad_()
    decay = ones.clone().requires_grad_()
    borders = torch.tensor([0, n // 3, n], dtype=torch.int32, device=device)
    group = torch.arange(n, device=device) % 5
    trained = ones.bool()
    steps = (
        lambda: linear_logprob(hidden, weight, target, **TRITON),
        lambda: logits_logprob(logits, target, **TRITON).logprob.sum().backward(),
        lambda: token_objective(logprob, x, x, ones, ones, kl_coef=0.1, **TRITON).loss.sum().backward(),
        lambda: reverse_scan(x, decay, borders, **TRITON).sum().backward(),
        lambda: gae(x, x, borders, trained, gamma=0.99, lam=0.95, **TRITON),
        lambda: group_advantage(x, group, **TRITON),
        lambda: rms_norm(hidden, weight[0], epsilon=1e-6, **TRITON).sum().backward(),
        lambda: swiglu(hidden, hidden.detach(), **TRITON).sum().backward(),
        lambda: (
            rotary(hidden[:, None], hidden[:, None], hidden.detach(), hidden.detach(), **TRITON)[0].sum().backward()
        ),
    )
    for run in steps:
        run()  # compiling waits
        with syncs(device, "error"):
            run()


@on(cpu=(40, 16, 300), cuda=(4096, 1024, 50257))
def test_leaving_rows_out_waits_once_a_chunk_and_once_for_the_weights(device, sizes):
    n, d, v = sizes
    hidden, weight, target = (
        x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, d, v, device=device)
    )
    row_weight = (torch.arange(n, device=device) % 4 != 0).float()
    chunks = 4
    single = partial(linear_token_loss, hidden, weight, target, nll, row_weight=row_weight, **TRITON)
    steps = {
        lambda: single(chunk_rows=n // chunks).loss.backward(): 1 + chunks,
        lambda: linear_logprob(
            hidden, weight, target, cache_gib=0.0, chunk_rows=n // chunks, **TRITON
        ).logprob.sum().backward(): chunks,
    }  # fmt: skip
    for run, allowed in steps.items():
        run()
        with syncs(device, "warn") as found:
            run()
        assert len(found) <= allowed
        assert (len(found) > 0) == (device == "cuda")
