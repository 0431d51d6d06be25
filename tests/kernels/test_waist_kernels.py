"""The waist with backend="triton": the loops are torch's, so here is what the kernels change, on CPU and on a GPU."""

from __future__ import annotations

import math
import threading
from functools import partial

import pytest
import torch

from fastrl.ops import linear_cross_entropy, linear_logprob, linear_token_loss, logits_logprob
from fastrl.ops.linear_logprob import reference
from fastrl.ops.logits_logprob import reference as logits_reference
from fastrl.testing import assert_no_worse_than, double, gemm_flops, linear_logprob_inputs, value_and_grads
from tests.ops.test_linear_logprob import MEMORY, OPTIONS, inputs

TRITON = {"backend": "triton"}
token_loss_reference = partial(linear_token_loss, backend="reference")


@pytest.mark.parametrize("options", OPTIONS)
def test_linear_logprob_in_float32_partly_cached(options):
    x = inputs()
    spec = partial(reference, **OPTIONS[options])
    assert_no_worse_than(
        naive=value_and_grads(spec, *x),
        got=value_and_grads(partial(linear_logprob, **OPTIONS[options], **MEMORY["half cached"], **TRITON), *x),
        truth=value_and_grads(spec, *double(x)),
        slack=2e-6,
    )


@pytest.mark.parametrize("memory", ["cached", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_linear_logprob_in_every_other_type(dtype, memory):
    x = inputs(dtype)
    assert_no_worse_than(
        naive=value_and_grads(reference, *x),
        got=value_and_grads(partial(linear_logprob, **MEMORY[memory], **TRITON), *x),
        truth=value_and_grads(reference, *double(x)),
        slack=1e-13 if dtype == torch.float64 else 2e-6,
        factor=1.2,  # the interpreter cuts probabilities kept in bf16 off where a GPU rounds them
    )


def test_peaked_rows_keep_their_small_gradients():
    x = linear_logprob_inputs(37, 64, 509, peak=20.0)
    assert_no_worse_than(
        naive=value_and_grads(reference, *x),
        got=value_and_grads(partial(linear_logprob, **TRITON), *x),
        truth=value_and_grads(reference, *double(x)),
        slack=2e-6,
    )


@pytest.mark.parametrize("memory", ["cached", "recomputed"])
def test_a_bias_with_forbidden_tokens_gives_no_nan(memory):
    hidden, weight, target = inputs()
    bias = torch.linspace(-1, 1, 509)
    bias[100:300] = -math.inf
    bias[target.clamp(min=0)] = 0.5

    def call(function, **kwargs):
        return lambda h, w, b: function(h, w, target, bias=b, temperature=0.8, **kwargs)

    got = value_and_grads(call(linear_logprob, **MEMORY[memory], **TRITON), hidden, weight, bias)
    assert all(y.isfinite().all() for y in (*got.values, *got.grads))
    assert_no_worse_than(
        naive=value_and_grads(call(reference), hidden, weight, bias),
        got=got,
        truth=value_and_grads(call(reference), *double((hidden, weight, bias))),
        slack=2e-6,
    )


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows_keep_the_graph_connected(n):
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, 4, 130))
    sum(x.sum() for x in linear_logprob(hidden, weight, target, **TRITON)).backward()
    assert hidden.grad.shape == (n, 4)
    assert (weight.grad != 0).any() == (n > 0)


def test_chunks_change_rounding_only():
    x = inputs()
    whole = value_and_grads(partial(linear_logprob, **TRITON), *x)
    for chunk_rows in (9, 36):
        got = value_and_grads(partial(linear_logprob, chunk_rows=chunk_rows, **TRITON), *x)
        torch.testing.assert_close(tuple(got), tuple(whole), rtol=1e-5, atol=2e-6)


def half(logprob, entropy, rows):
    """Every other row has a coefficient; one in four of the others has an entropy bonus too."""
    return -logprob * (rows % 2) - 0.1 * (rows % 4 == 3) * entropy


def token_loss(function, x, **kwargs):
    row_weight = (torch.arange(len(x[2]), device=x[2].device) % 3).to(x[0].dtype)

    def call(hidden, weight, target):
        result = function(hidden, weight, target, half, row_weight=row_weight, **kwargs)
        return result.loss, *result.stats

    return value_and_grads(call, *x)


@pytest.mark.parametrize("chunk_rows", [5, None])
@pytest.mark.parametrize("options", ["plain", "temperature per row", "softcap, scale, temperature"])
def test_the_single_pass_moves_only_rows_with_a_coefficient(options, chunk_rows):
    x = inputs()
    assert_no_worse_than(
        naive=token_loss(token_loss_reference, x, **OPTIONS[options]),
        got=token_loss(linear_token_loss, x, chunk_rows=chunk_rows, **OPTIONS[options], **TRITON),
        truth=token_loss(token_loss_reference, double(x), **OPTIONS[options]),
        slack=3e-6,
    )


def test_work_and_skipped_rows_are_those_of_the_torch_backend():
    n, d, v = 60, 64, 200
    hidden, weight, target = linear_logprob_inputs(n, d, v, peak=25.0)
    hidden[:6] = 0
    hidden.requires_grad_()
    weight.requires_grad_()
    nll = lambda logprob, entropy, rows: -logprob  # noqa: E731
    for skip_tolerance in (0.0, 0.05):
        work = [
            gemm_flops(
                lambda b=backend, s=skip_tolerance: linear_token_loss(
                    hidden, weight, target, nll, skip_tolerance=s, backend=b
                )
            )
            for backend in ("torch", "triton")
        ]
        assert work[0] == work[1]
    assert work[1] < 1.4 * 2 * n * d * v


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_with_smoothing_and_z_loss(label_smoothing):
    x = inputs()
    op = partial(linear_cross_entropy, label_smoothing=label_smoothing, z_loss=1e-3, chunk_rows=9)
    assert_no_worse_than(
        naive=value_and_grads(partial(op, backend="reference"), *x),
        got=value_and_grads(partial(op, **TRITON), *x),
        truth=value_and_grads(partial(op, backend="reference"), *double(x)),
        slack=2e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_exist_are_read_in_their_own_type_and_survive(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(9, 509, generator=generator)).to(dtype)
    target = torch.randint(509, (9,), generator=generator).index_fill(0, torch.tensor([2]), -100)
    before = logits.clone()
    for options in ({"temperature": 0.7}, {"softcap": 2.0, "valid_vocab": 509}):
        spec = partial(logits_reference, **options)
        assert_no_worse_than(
            naive=value_and_grads(spec, logits, target),
            got=value_and_grads(partial(logits_logprob, chunk_rows=4, **options, **TRITON), logits, target),
            truth=value_and_grads(spec, *double((logits, target))),
            slack=1e-13 if dtype == torch.float64 else 2e-6,
            factor=3.0 if dtype == torch.bfloat16 else 1.0,  # the interpreter cuts bf16 results off
        )
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["every other column", "transposed", "some columns"])
def test_logits_of_any_layout_are_accepted(layout):
    logits, target = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    wide = {
        "every other column": logits.repeat_interleave(2, dim=1)[:, ::2],
        "transposed": logits.t().contiguous().t(),
        "some columns": torch.cat([logits, torch.full((6, 9), math.nan)], 1)[:, :40],
    }[layout]
    a, b = (value_and_grads(partial(logits_logprob, **TRITON), x, target) for x in (logits, wide))
    torch.testing.assert_close(tuple(a), tuple(b), rtol=0, atol=0)


def test_a_second_backward_gives_the_same_numbers():
    for cache_gib in (0.0, 1.0):
        hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(9, 4, 200))
        stats = linear_logprob(hidden, weight, target, cache_gib=cache_gib, **TRITON)
        root = (stats.logprob - stats.entropy).sum()
        first = torch.autograd.grad(root, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(root, (hidden, weight)), first, rtol=0, atol=0)


def test_backward_runs_in_a_thread_of_its_own():
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(9, 4, 200))
    stats = linear_logprob(hidden, weight, target, cache_gib=0.0, **TRITON)
    thread = threading.Thread(target=stats.logprob.sum().backward)
    thread.start()
    thread.join()
    assert (hidden.grad != 0).any(1).all()


def test_batch_invariant_statistics_have_the_same_bits_and_ordinary_gradients():
    hidden, weight, target = inputs()
    op = partial(linear_logprob, batch_invariant=True, temperature=0.7, **TRITON)
    whole = torch.stack(op(hidden, weight, target, chunk_rows=10))
    parts = [torch.stack(op(hidden[a:b], weight, target[a:b])) for a, b in ((0, 1), (1, 37))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)
    spec = partial(reference, temperature=0.7)
    assert_no_worse_than(
        naive=value_and_grads(spec, *inputs()),
        got=value_and_grads(op, *inputs()),
        truth=value_and_grads(spec, *double(inputs())),
        slack=2e-6,
    )


def test_batch_invariance_that_cannot_be_had_is_refused():
    x = inputs()
    for backend in ("torch", "reference"):
        with pytest.raises(RuntimeError, match="batch_invariant needs backend 'triton'"):
            linear_logprob(*x, batch_invariant=True, backend=backend)
    with pytest.raises(ValueError, match="is for float32, bfloat16 and float16"):
        linear_logprob(*inputs(torch.float64), batch_invariant=True, **TRITON)


def test_without_a_gradient_the_table_may_leave_the_logits_out(monkeypatch):
    hidden, weight, target = inputs()
    separate = linear_logprob(hidden, weight, target, **TRITON)
    monkeypatch.setattr("fastrl.kernels.tuning.fuses_statistics", lambda hidden, v: True)
    fused = {}

    def run():
        fused["stats"] = linear_logprob(hidden, weight, target, **TRITON)
        fused["loss"] = linear_token_loss(hidden, weight, target, half, **TRITON).stats

    assert gemm_flops(run) == 0  # torch multiplied nothing
    for stats in fused.values():
        torch.testing.assert_close(tuple(stats), tuple(separate), rtol=2e-6, atol=2e-6)


GPU_SHAPES = [(133, 64, 509), (512, 1024, 151936), (257, 2048, 151669), (1, 896, 50257)]


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("options", ["plain", "softcap, scale, temperature"])
@pytest.mark.parametrize(("n", "d", "v"), GPU_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_linear_logprob_is_no_worse_than_plain_autograd(dtype, n, d, v, options, memory):
    x = linear_logprob_inputs(n, d, v, dtype=dtype, device="cuda")
    spec = partial(reference, **OPTIONS[options])
    assert_no_worse_than(
        naive=value_and_grads(spec, *x),
        got=value_and_grads(partial(linear_logprob, **OPTIONS[options], **MEMORY[memory], **TRITON), *x),
        truth=value_and_grads(spec, *double(x)),
        slack=1e-5,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_rows", [100, None])
@pytest.mark.parametrize(("n", "d", "v"), GPU_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_single_pass_is_no_worse_than_plain_autograd(dtype, n, d, v, chunk_rows):
    x = linear_logprob_inputs(n, d, v, dtype=dtype, device="cuda")
    assert_no_worse_than(
        naive=token_loss(token_loss_reference, x),
        got=token_loss(linear_token_loss, x, chunk_rows=chunk_rows, **TRITON),
        truth=token_loss(token_loss_reference, double(x)),
        slack=1e-5,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "d", "v"), GPU_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_fused_product_has_the_same_bits_in_every_batch(dtype, n, d, v):
    hidden, weight, target = linear_logprob_inputs(n, d, v, dtype=dtype, device="cuda")
    with torch.no_grad():
        whole = linear_logprob(hidden, weight, target, batch_invariant=True, **TRITON)
        first = linear_logprob(hidden[: n // 2 + 1], weight, target[: n // 2 + 1], batch_invariant=True, **TRITON)
        truth = reference(*double((hidden, weight, target)))
    for a, b, exact in zip(whole, first, truth, strict=True):
        torch.testing.assert_close(a[: n // 2 + 1], b, rtol=0, atol=0)
        torch.testing.assert_close(a.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_offsets_past_two_to_the_31_are_right(dtype):
    n, v = 16384, 151936  # 2.5e9 numbers
    logits = torch.zeros(n, v, dtype=dtype, device="cuda")
    target = torch.full((n,), 7, device="cuda")
    logits[-1, 7] = 12.0
    logits.requires_grad_()
    stats = logits_logprob(logits, target, chunk_rows=n, **TRITON)
    assert stats.logprob[-1].item() == pytest.approx(12 - math.log(v - 1 + math.exp(12)), abs=1e-4)
    (grad,) = torch.autograd.grad(stats.logprob[-1], logits)
    assert (grad[0] == 0).all()
    p = math.exp(12) / (v - 1 + math.exp(12))
    assert grad[-1, 7].item() == pytest.approx(1 - p, rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
