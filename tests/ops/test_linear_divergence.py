"""Divergence between two heads: the definition in float64, the edges of distributions, the pass's cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastrl.ops import linear_cross_entropy, linear_divergence
from fastrl.ops.linear_divergence import reference
from fastrl.testing import MemoryMeter, assert_no_worse_than, double, gemm_flops, value_and_grads
from tests.ops.distillation import BETAS, heads, numpy_divergence, probabilities

SIZES = [(509, 0.0), (128, 0.0), (509, 16.0), (1, 0.0)]  # vocabulary, and how far a favourite stands out
BACKENDS = ["reference", "torch"]


def loss_and_rows(op, **options):
    """The op of (hidden, weight) and then the rest, as a tuple of tensors."""

    def call(hidden, weight, *rest):
        result = op(hidden, weight, *rest, **options)
        return result.loss, result.divergence

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_is_its_definition_in_probabilities(beta, backend):
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(dtype=torch.float64)
    got = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, beta=beta, temperature=1.7, backend=backend)
    q = probabilities((hidden @ weight.t()).numpy() / 1.7)
    p = probabilities((teacher_hidden @ teacher_weight.t()).numpy() / 1.7)
    truth = numpy_divergence(q, p, beta)
    np.testing.assert_allclose(got.divergence.numpy(), truth, rtol=1e-12)
    assert got.loss.item() == pytest.approx(truth.sum(), rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("v", "peak", "dtype", "backend"),
    [
        *((v, peak, dtype, "torch") for v, peak in SIZES for dtype in (torch.float32, torch.bfloat16)),
        (509, 16.0, torch.float32, "triton"),
        (1, 0.0, torch.bfloat16, "triton"),
    ],
)
def test_value_and_gradient_are_as_good_as_the_naive_ones(v, peak, dtype, beta, backend):
    x = heads(7, v=v, dtype=dtype, peak=peak)[:4]
    op = loss_and_rows(linear_divergence, beta=beta, temperature=0.8, chunk_rows=4, backend=backend)
    spec = loss_and_rows(reference, beta=beta, temperature=0.8)
    assert_no_worse_than(
        naive=value_and_grads(spec, *x, differentiable=[0, 1]),
        got=value_and_grads(op, *x, differentiable=[0, 1]),
        truth=value_and_grads(spec, *double(x), differentiable=[0, 1]),
        slack=2e-6,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck_with_every_option(beta):
    hidden, weight, teacher_hidden, teacher_weight, target = heads(5, 3, 7, 4, torch.float64)
    target[2] = -100
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    teacher_bias = bias.flip(0)

    def loss(h, w, b):
        return linear_divergence(
            h,
            w,
            teacher_hidden,
            teacher_weight,
            beta=beta,
            target=target % 5,
            alpha=0.3,
            bias=b,
            teacher_bias=teacher_bias,
            temperature=1.3,
            softcap=2.0,
            teacher_softcap=3.0,
            logit_scale=1.1,
            teacher_logit_scale=0.9,
            valid_vocab=6,
            row_weight=torch.tensor([0.5, 0.0, 1.0, 2.0, 0.1]),
            chunk_rows=2,
        ).loss

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.parametrize(("beta", "backend"), [*((beta, "torch") for beta in BETAS), (0.3, "triton")])
def test_every_option_means_what_the_reference_says(beta, backend):
    hidden, weight, teacher_hidden, teacher_weight, target = heads(dtype=torch.float64)
    target[5] = -1
    options = {
        "beta": beta,
        "target": target % 400,
        "alpha": 0.3,
        "bias": torch.linspace(-1, 1, 509, dtype=torch.float64),
        "teacher_bias": torch.linspace(1, -1, 509, dtype=torch.float64),
        "temperature": 2.0,
        "softcap": 3.0,
        "teacher_softcap": 2.0,
        "logit_scale": 1.1,
        "teacher_logit_scale": 0.9,
        "valid_vocab": 400,
        "row_weight": torch.arange(37) % 3 / 2,
    }
    truth = reference(hidden, weight, teacher_hidden, teacher_weight, **options)
    got = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, chunk_rows=8, backend=backend, **options)
    for a, b in ((got.loss, truth.loss), (got.divergence, truth.divergence), *zip(got.stats, truth.stats, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_alone_are_cross_entropy_and_their_share_is_linear(backend):
    hidden, weight, teacher_hidden, teacher_weight, target = heads(dtype=torch.float64)

    def loss(alpha):
        return linear_divergence(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            target=target,
            alpha=alpha,
            temperature=3.0,
            row_weight=torch.full((37,), 1 / 37),
            backend=backend,
        ).loss

    torch.testing.assert_close(loss(1.0), linear_cross_entropy(hidden, weight, target), rtol=1e-7, atol=0)
    torch.testing.assert_close(loss(0.25), 0.75 * loss(0.0) + 0.25 * loss(1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient(beta, backend):
    hidden, weight, *_ = heads()
    got = value_and_grads(loss_and_rows(linear_divergence, beta=beta, backend=backend), hidden, weight, hidden, weight)
    assert got.values[0].abs() < 1e-5
    assert all(grad.abs().max() < 1e-5 for grad in got.grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
def test_tokens_that_both_forbid_count_nothing(beta, backend):
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(6, 4, 9, 5)
    bias = torch.zeros(9).index_fill(0, torch.tensor([2, 7]), -math.inf)
    allowed = bias.isfinite()

    def op(h, w, **options):
        return linear_divergence(h, w, teacher_hidden, **options, beta=beta, backend=backend).loss

    masked = value_and_grads(
        lambda h, w: op(h, w, teacher_weight=teacher_weight, bias=bias, teacher_bias=bias), hidden, weight
    )
    without = value_and_grads(lambda h, w: op(h, w, teacher_weight=teacher_weight[allowed]), hidden, weight[allowed])
    torch.testing.assert_close(masked.values[0], without.values[0])
    torch.testing.assert_close(masked.grads[0], without.grads[0])
    torch.testing.assert_close(masked.grads[1][allowed], without.grads[1])
    assert (masked.grads[1][~allowed] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_one_side_alone_forbids_is_infinite_for_one_kl_and_free_for_the_other(backend):
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(3, 4, 9, 5)
    bias = torch.zeros(9).index_fill(0, torch.tensor([2]), -math.inf)

    def rows(beta, **options):
        return linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, beta=beta, backend=backend, **options
        ).divergence

    assert (rows(0.0, bias=bias) == math.inf).all()
    assert rows(1.0, bias=bias).isfinite().all()
    assert rows(0.0, teacher_bias=bias).isfinite().all()
    assert (rows(1.0, teacher_bias=bias) == math.inf).all()
    assert rows(0.5, bias=bias).isfinite().all()
    assert (rows(0.5, teacher_bias=bias) <= math.log(2)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "weighted"), [(0, 0), (1, 1), (3, 0)])
def test_few_rows_and_none_with_a_weight(n, weighted, backend):
    hidden, weight, teacher_hidden, teacher_weight, target = heads(n, 4, 7, 5)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    options = {"target": target, "alpha": 0.5, "row_weight": torch.full((n,), float(weighted)), "backend": backend}
    got = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, **options)
    got.loss.backward()
    assert got.divergence.shape == (n,)
    assert (got.loss > 0) == bool(weighted)
    assert weight.grad.any() == bool(weighted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_never_reach_a_head(backend):
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(6, 4, 9, 5)
    row_weight = torch.tensor([1.0, 0, 2.0, 0, 0, 1.0])
    kept = row_weight != 0
    hidden[~kept], teacher_hidden[~kept] = math.nan, math.nan
    got = value_and_grads(
        loss_and_rows(linear_divergence, row_weight=row_weight, backend=backend),
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
    )
    assert all(x.isfinite().all() for x in (*got.values, *got.grads))
    assert (got.values[1] != 0).tolist() == kept.tolist()
    assert (got.grads[0][~kept] == 0).all()


def test_chunks_change_rounding_only_and_a_second_backward_sees_the_same():
    hidden, weight, teacher_hidden, teacher_weight, target = heads()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    grads = []
    for chunk_rows in (1, 10, 37):
        loss = linear_divergence(
            *leaves, teacher_hidden, teacher_weight, beta=0.5, target=target, alpha=0.2, chunk_rows=chunk_rows
        ).loss
        grads.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        again = torch.autograd.grad(loss, leaves, grad_outputs=torch.tensor(2.0))
        for once, twice in zip(grads[-1], again, strict=True):
            torch.testing.assert_close(2 * once, twice, rtol=0, atol=0)
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


def test_the_teacher_gets_no_gradient_and_may_have_another_precision_and_padding():
    hidden, weight, teacher_hidden, teacher_weight, _ = heads()
    teacher = [x.bfloat16().requires_grad_() for x in (teacher_hidden, teacher_weight)]
    weight = weight.requires_grad_()
    got = linear_divergence(hidden, weight[:500], *teacher, valid_vocab=490)
    got.loss.backward()
    assert teacher[0].grad is None
    assert teacher[1].grad is None
    exact = [x.detach().float() for x in teacher]
    torch.testing.assert_close(got.loss, linear_divergence(hidden, weight[:490], exact[0], exact[1][:490]).loss)


@pytest.mark.parametrize("beta", BETAS)
def test_it_makes_three_products_for_the_student_and_one_for_the_teacher_in_bounded_memory(beta):
    n, d, v, e = 256, 4, 100, 6
    hidden, weight, teacher_hidden, teacher_weight, target = heads(n, d, v, e)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def run():
        linear_divergence(
            *leaves, teacher_hidden, teacher_weight, beta=beta, target=target, alpha=0.1, chunk_rows=16
        ).loss.backward()

    assert gemm_flops(run) == 6 * n * d * v + 2 * n * e * v
    with torch.no_grad():
        assert gemm_flops(lambda: linear_divergence(*leaves, teacher_hidden, teacher_weight)) == 2 * n * (d + e) * v
    with MemoryMeter(*leaves, teacher_hidden, teacher_weight, target) as meter:
        run()
    assert meter.largest_numel <= 16 * v
    assert meter.peak_bytes <= 4 * (9 * 16 * v + 3 * v * d + 8 * n * d)


def test_the_default_chunks_keep_a_large_product_of_rows_and_tokens_away():
    n, v = 2048, 4000
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(n, 2, v, 3)
    with MemoryMeter(hidden, weight, teacher_hidden, teacher_weight) as meter:
        linear_divergence(hidden, weight.requires_grad_(), teacher_hidden, teacher_weight)
    assert meter.largest_numel <= n * v // 8


def test_main_grad_takes_the_gradient_of_the_head():
    hidden, weight, teacher_hidden, teacher_weight, _ = heads()
    expected = value_and_grads(
        lambda w: linear_divergence(hidden, w, teacher_hidden, teacher_weight).loss, weight
    ).grads[0]
    weight = weight.requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    (3 * linear_divergence(hidden, weight, teacher_hidden, teacher_weight).loss).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + 3 * expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": torch.zeros(4, 5)}, r"teacher_hidden must be \[N,E\] with N=3"),
        ({"teacher_weight": torch.zeros(8, 5)}, "heads of 7 and 8 tokens.*pass valid_vocab of at most 7"),
        ({"teacher_weight": torch.zeros(6, 5), "valid_vocab": 7}, "heads of 7 and 6 tokens"),
        ({"teacher_weight": torch.zeros(7, 5).double()}, "teacher_hidden and teacher_weight must have one"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"alpha": 0.5}, "pass target, or alpha=0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, r"temperature must be one number, got a tensor of shape \(3,\)"),
        ({"teacher_bias": torch.zeros(7, device="meta")}, "teacher_bias is on meta and hidden on cpu"),
        ({"target": torch.tensor([0, 9, 0])}, "below the vocabulary of 7, got 9"),
        ({"row_weight": torch.ones(3, requires_grad=True)}, "row_weight is a constant"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change, message):
    arguments = {"teacher_hidden": torch.zeros(3, 5), "teacher_weight": torch.zeros(7, 5)} | change
    with pytest.raises(ValueError, match=message):
        linear_divergence(torch.zeros(3, 4), torch.zeros(7, 4), **arguments)
