"""The waist against its specification in float64: values, gradients, memory, work, and every option."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.ops import Lora, linear_logprob, use_backend
from fastrl.ops.linear_logprob import reference
from fastrl.testing import MemoryMeter, assert_no_worse_than, double, gemm_flops, linear_logprob_inputs, value_and_grads

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperature per row": {"temperature": torch.linspace(0.5, 2.0, 37)},
    "softcap": {"softcap": 2.0},
    "softcap, scale, temperature": {"softcap": 2.0, "logit_scale": -1.3, "temperature": 0.7},
    "padded vocabulary": {"valid_vocab": 400},
}
MEMORY = {"cached": {}, "recomputed": {"cache_gib": 0.0}, "half cached": {"cache_gib": 1e-4, "chunk_rows": 5}}


def inputs(dtype=torch.float32, **kwargs):
    """37 rows, 16 hidden, 509 tokens, two of them ignored."""
    hidden, weight, target = linear_logprob_inputs(37, 16, 509, dtype=dtype, **kwargs)
    target = (target % 400).index_fill(0, torch.tensor([3, 36]), -100)
    return hidden, weight, target


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_no_worse_than_plain_autograd(dtype, options, memory):
    x = inputs(dtype)
    spec = partial(reference, **OPTIONS[options])
    assert_no_worse_than(
        naive=value_and_grads(spec, *x),
        got=value_and_grads(partial(linear_logprob, **OPTIONS[options], **MEMORY[memory]), *x),
        truth=value_and_grads(spec, *double(x)),
        slack=1e-13 if dtype == torch.float64 else 2e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
def test_peaked_rows_keep_their_small_gradients(dtype, memory):
    x = linear_logprob_inputs(37, 64, 509, dtype=dtype, peak=20.0)
    assert reference(*x).logprob.median() > -1e-2
    assert_no_worse_than(
        naive=value_and_grads(reference, *x),
        got=value_and_grads(partial(linear_logprob, **MEMORY[memory]), *x),
        truth=value_and_grads(reference, *double(x)),
        slack=2e-6,
    )


def test_the_three_statistics_of_a_row_a_reader_can_check():
    # Logits log(1), log(2), log(5): probabilities 1/8, 2/8, 5/8.
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    stats = linear_logprob(torch.ones(1, 1), weight, torch.tensor([2]))
    p = [1 / 8, 2 / 8, 5 / 8]
    torch.testing.assert_close(stats.logprob, torch.tensor([math.log(5 / 8)]))
    torch.testing.assert_close(stats.lse, torch.tensor([math.log(8)]))
    torch.testing.assert_close(stats.entropy, torch.tensor([-sum(q * math.log(q) for q in p)]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_softcap_comes_before_the_temperature(backend):
    weight = torch.tensor([[3.0], [-1.0]])
    stats = linear_logprob(
        torch.ones(1, 1), weight, torch.tensor([0]), softcap=2.0, logit_scale=0.5, temperature=0.25, backend=backend
    )
    z = [2 * math.tanh(0.5 * x / 2) / 0.25 for x in (3.0, -1.0)]
    assert stats.lse.item() == pytest.approx(math.log(sum(map(math.exp, z))), rel=1e-6)
    assert stats.logprob.item() == pytest.approx(z[0] - math.log(sum(map(math.exp, z))), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_bias_with_forbidden_tokens_gives_no_nan(dtype, memory):
    hidden, weight, target = inputs(dtype)
    bias = torch.linspace(-1, 1, 509, dtype=dtype)
    bias[100:300] = -math.inf
    bias[target.clamp(min=0)] = 0.5

    def call(function, **kwargs):
        return lambda h, w, b: function(h, w, target, bias=b, temperature=0.8, **kwargs)

    x = (hidden, weight, bias)
    got = value_and_grads(call(linear_logprob, **MEMORY[memory]), *x)
    assert all(y.isfinite().all() for y in (*got.values, *got.grads))
    assert_no_worse_than(
        naive=value_and_grads(call(reference), *x),
        got=got,
        truth=value_and_grads(call(reference), *double(x)),
        slack=1e-13 if dtype == torch.float64 else 2e-6,
    )


@pytest.mark.parametrize("memory", MEMORY)
def test_a_forbidden_target_has_logprob_minus_infinity_and_finite_gradients(memory):
    bias = torch.zeros(5)
    bias[2] = -math.inf
    stats = linear_logprob(torch.ones(1, 3), torch.eye(5, 3), torch.tensor([2]), bias=bias, **MEMORY[memory])
    assert stats.logprob.item() == -math.inf
    assert stats.entropy.isfinite()
    _, grads = value_and_grads(
        lambda h, b: linear_logprob(h, torch.eye(5, 3), torch.tensor([2]), bias=b, **MEMORY[memory])[:2],
        torch.ones(1, 3),
        bias,
    )
    assert all(g.isfinite().all() for g in grads)


def test_gradcheck_in_float64_with_every_option():
    hidden, weight, target = linear_logprob_inputs(5, 3, 7, dtype=torch.float64)
    target[1] = -1
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    for cache_gib, softcap in ((0.0, 1.5), (0.0, None), (1.0, None)):

        def call(h, w, b, cache_gib=cache_gib, softcap=softcap):
            options = {"bias": b, "temperature": 0.7, "softcap": softcap, "logit_scale": 1.2, "valid_vocab": 6}
            return tuple(linear_logprob(h, w, target % 6, **options, cache_gib=cache_gib, chunk_rows=2))

        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        assert torch.autograd.gradcheck(call, leaves)


def test_ignored_targets_have_logprob_zero_and_leave_the_other_statistics_alone():
    hidden, weight, target = linear_logprob_inputs(4, 8, 11)
    full = linear_logprob(hidden, weight, target)
    some = linear_logprob(hidden, weight, target.index_fill(0, torch.tensor([1]), -100))
    assert some.logprob[1] == 0
    torch.testing.assert_close(some.entropy, full.entropy)
    torch.testing.assert_close(some.lse, full.lse)
    _, grads = value_and_grads(lambda h: linear_logprob(h, weight, torch.full((4,), -100)).logprob, hidden)
    assert (grads[0] == 0).all()


def test_padded_vocabulary_rows_get_no_probability_and_no_gradient():
    hidden, weight, target = linear_logprob_inputs(6, 8, 11)
    leaf = weight.clone().requires_grad_()
    stats = linear_logprob(hidden, leaf, target % 9, valid_vocab=9)
    torch.testing.assert_close(tuple(stats), tuple(linear_logprob(hidden, weight[:9], target % 9)))
    stats.logprob.sum().backward()
    assert (leaf.grad[9:] == 0).all()
    assert (leaf.grad[:9] != 0).any(1).all()


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_any_number_of_rows_keeps_the_graph_connected(n, backend):
    hidden, weight, target = (
        x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, 4, 509, dtype=torch.float64)
    )
    stats = linear_logprob(hidden, weight, target, backend=backend)
    assert all(x.shape == (n,) for x in stats)
    sum(x.sum() for x in stats).backward()
    assert hidden.grad.shape == (n, 4)
    assert weight.grad.isfinite().all()
    assert (weight.grad != 0).any() == (n > 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 5),
    v=st.integers(1, 12),
    chunk_rows=st.integers(1, 11),
    cache_gib=st.sampled_from([0.0, 2.0**-30 * 200, 1.0]),
    seed=st.integers(0, 3),
)
def test_every_shape_and_chunk_size_agrees_with_the_specification(n, d, v, chunk_rows, cache_gib, seed):
    x = linear_logprob_inputs(n, d, v, dtype=torch.float64, seed=seed)
    spec = value_and_grads(reference, *x)
    got = value_and_grads(partial(linear_logprob, chunk_rows=chunk_rows, cache_gib=cache_gib), *x)
    assert_no_worse_than(naive=spec, got=got, truth=spec, slack=1e-13)


def test_permuting_the_rows_permutes_the_result():
    hidden, weight, target = linear_logprob_inputs(23, 8, 50, dtype=torch.float64)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    plain = linear_logprob(hidden, weight, target, chunk_rows=4)
    mixed = linear_logprob(hidden[order], weight, target[order], chunk_rows=4)
    torch.testing.assert_close(tuple(x[order] for x in plain), tuple(mixed), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_no_tensor_of_n_times_v_numbers_ever_exists(cache_gib):
    n, d, v = 512, 4, 300
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, d, v))
    with MemoryMeter(hidden, weight, target) as meter:
        stats = linear_logprob(hidden, weight, target, chunk_rows=32, cache_gib=cache_gib)
        (stats.logprob + stats.entropy).sum().backward()
    assert meter.largest_numel <= 32 * v
    with MemoryMeter(hidden, weight, target) as naive:
        stats = reference(hidden, weight, target)
        (stats.logprob + stats.entropy).sum().backward()
    assert naive.largest_numel == n * v  # the meter would have seen it
    if not cache_gib:
        assert meter.peak_bytes < naive.peak_bytes / 10


def test_the_cache_stays_inside_its_budget():
    n, v = 512, 256
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, 4, v))
    kept = {}
    for rows in (0, 128, 512):
        with MemoryMeter(hidden, weight, target) as meter:
            stats = linear_logprob(hidden, weight, target, chunk_rows=32, cache_gib=rows * v * 4 / 2**30)
        kept[rows] = meter.peak_bytes
        del stats
    assert kept[128] - kept[0] == pytest.approx(128 * v * 4, rel=0.01)
    assert kept[512] - kept[0] == pytest.approx(512 * v * 4, rel=0.3)


def gemm_units(n, d, v, run):
    """Matrix-product work in units of 2 N D V."""
    return gemm_flops(run) / (2 * n * d * v)


def test_work_is_one_product_forward_and_two_or_three_backward():
    n, d, v = 60, 8, 40
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, d, v))
    stats = {}
    for name, cache_gib in (("cached", 1.0), ("recomputed", 0.0)):
        stats[name] = None

        def forward(name=name, cache_gib=cache_gib):
            stats[name] = linear_logprob(hidden, weight, target, chunk_rows=20, cache_gib=cache_gib)

        assert gemm_units(n, d, v, forward) == 1
    assert gemm_units(n, d, v, lambda: stats["cached"].logprob.sum().backward()) == 2
    assert gemm_units(n, d, v, lambda: stats["recomputed"].logprob.sum().backward()) == 3
    with torch.no_grad():
        assert gemm_units(n, d, v, lambda: linear_logprob(hidden, weight, target)) == 1


def test_rows_without_a_coefficient_and_frozen_tensors_cost_nothing_in_backward():
    n, d, v = 60, 8, 40
    hidden, weight, target = linear_logprob_inputs(n, d, v)
    hidden.requires_grad_()
    coefficient = (torch.arange(n) % 3 == 0).float()  # a third of the rows
    stats = linear_logprob(hidden, weight, target, cache_gib=0.0, chunk_rows=20)
    # Frozen head: the logits again and d hidden, for a third of the rows.
    assert gemm_units(n, d, v, lambda: (coefficient * stats.logprob).sum().backward()) == pytest.approx(2 / 3, abs=0.02)


def test_a_second_backward_gives_the_same_numbers():
    for cache_gib in (0.0, 1.0):
        hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(9, 4, 20))
        stats = linear_logprob(hidden, weight, target, cache_gib=cache_gib)
        root = (stats.logprob - stats.entropy).sum()
        first = torch.autograd.grad(root, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(root, (hidden, weight)), first, rtol=0, atol=0)


def test_a_derivative_of_the_gradient_is_refused():
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(2, 3, 4))
    total = linear_logprob(hidden, weight, target).logprob.square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_logits_stay_float32_under_autocast():
    hidden, weight, target = linear_logprob_inputs(9, 64, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprob(hidden, weight, target)
    torch.testing.assert_close(tuple(inside), tuple(linear_logprob(hidden, weight, target)), rtol=0, atol=0)


def test_the_context_chooses_the_backend():
    hidden, weight, target = linear_logprob_inputs(64, 4, 30)
    with use_backend("reference"), MemoryMeter() as meter:
        linear_logprob(hidden, weight, target, chunk_rows=2)
    assert meter.largest_numel == 64 * 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 5)}, r"weight must be \[V,D\] with D=4, got shape \(7, 5\)"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must be \[N\] with N=3, got shape \(2,\)"),
        ({"target": torch.zeros(3)}, "target must be int64, got torch.float32"),
        ({"target": torch.tensor([0, 7, 0])}, "below the vocabulary of 7, got 7"),
        ({"target": torch.tensor([0, 5, 0]), "valid_vocab": 5}, "below the vocabulary of 5, got 5"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "must have one dtype"),
        ({"bias": torch.zeros(6)}, r"bias must be \[V\] with V=7"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(3, 1)}, r"temperature must be \[N\], got shape \(3, 1\)"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature is a constant"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"logit_scale": math.nan}, "logit_scale must be finite"),
        ({"valid_vocab": 8}, "valid_vocab must be between 1 and V=7"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
        ({"softcap": math.inf}, "softcap must be positive and finite, or None"),
        ({"cache_gib": -1.0}, "cache_gib must be a number of GiB, finite and not negative"),
        ({"cache_gib": math.nan}, "cache_gib must be a number of GiB, finite and not negative"),
        ({"cache_gib": "1"}, "cache_gib must be a number of GiB, finite and not negative"),
        ({"weight": torch.zeros(7, 4, device="meta")}, "weight is on meta and hidden on cpu: move one"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, "target is on meta and hidden on cpu"),
        ({"temperature": torch.ones(3, device="meta")}, "temperature is on meta and hidden on cpu"),
        ({"lora": Lora(torch.ones(2, 4), torch.ones(7, 2, device="meta"))}, "lora.b is on meta and hidden on cpu"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change, message):
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", MEMORY)
def test_on_a_gpu_values_and_gradients_are_no_worse_than_plain_autograd(dtype, memory):
    x = linear_logprob_inputs(133, 64, 509, dtype=dtype, device="cuda")
    assert_no_worse_than(
        naive=value_and_grads(reference, *x),
        got=value_and_grads(partial(linear_logprob, backend="torch", **MEMORY[memory]), *x),
        truth=value_and_grads(reference, *double(x)),
        slack=1e-4,
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("memory", MEMORY)
def test_an_observer_sees_every_mapped_logit_once_and_changes_nothing(memory, backend):
    hidden, weight, target = inputs()
    options = {"temperature": torch.linspace(0.5, 2.0, 37), "softcap": 2.0, "backend": backend, **MEMORY[memory]}
    seen = []
    got = linear_logprob(hidden, weight, target, observe=lambda z, rows: seen.append((rows, z.clone())), **options)
    z = 2 * torch.tanh(hidden @ weight.T / 2) / options["temperature"][:, None]
    torch.testing.assert_close(torch.cat([part for _, part in seen]), z, rtol=1e-5, atol=1e-5)
    assert [rows.start for rows, _ in seen] == [0, *(rows.stop for rows, _ in seen[:-1])]
    assert not any(part.requires_grad for _, part in seen)
    for with_observer, without in zip(got, linear_logprob(hidden, weight, target, **options), strict=True):
        assert torch.equal(with_observer, without)


def test_an_observer_costs_no_product():
    hidden, weight, target = inputs()
    assert gemm_flops(lambda: linear_logprob(hidden, weight, target, observe=lambda z, rows: None)) == 2 * 37 * 16 * 509


def test_an_observer_and_a_product_that_makes_no_logits_exclude_each_other():
    with pytest.raises(ValueError, match="leave it out"):
        linear_logprob(*inputs(), observe=lambda z, rows: None, batch_invariant=True)
