"""Distillation from k stored log-probabilities: k + 1 outcomes in NumPy float64, the tail, whole heads for k = V."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastrl.ops import TopTokens, linear_divergence, linear_top_tokens, linear_topk_divergence
from fastrl.ops.linear_topk_divergence import reference
from fastrl.testing import MemoryMeter, assert_no_worse_than, double, gemm_flops, value_and_grads
from tests.ops.distillation import BETAS, heads, numpy_divergence, probabilities, top_tokens

BACKENDS = ["reference", "torch", "triton"]


def loss_and_rows(op, teacher, **options):
    def call(hidden, weight):
        result = op(hidden, weight, teacher, **options)
        return result.loss, result.divergence

    return call


def outcomes(probability, ids):
    """[N, V] -> [N, K + 1]: the k tokens, and all others as one."""
    top = np.take_along_axis(probability, ids, -1)
    rest = probability.copy()
    np.put_along_axis(rest, ids, 0.0, -1)
    return np.concatenate([top, rest.sum(-1, keepdims=True)], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_is_its_definition_over_k_tokens_and_their_tail(beta, backend):
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(dtype=torch.float64)
    teacher = linear_top_tokens(teacher_hidden, teacher_weight, 5, temperature=1.7, chunk_rows=9)
    got = linear_topk_divergence(
        hidden, weight, teacher, beta=beta, temperature=1.7, chunk_rows=8, backend=backend
    ).divergence
    ids = teacher.ids.numpy()
    q = outcomes(probabilities((hidden @ weight.t()).numpy() / 1.7), ids)
    p = outcomes(probabilities((teacher_hidden @ teacher_weight.t()).numpy() / 1.7), ids)
    np.testing.assert_allclose(got.numpy(), numpy_divergence(q, p, beta), rtol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("v", "peak", "k"), [(509, 0.0, 8), (509, 16.0, 1), (7, 0.0, 7)])
def test_value_and_gradient_are_as_good_as_the_naive_ones(v, peak, k, beta, backend):
    x = heads(11, 16, v, peak=peak)
    teacher = linear_top_tokens(*double(x[2:4]), k)
    spec = loss_and_rows(reference, teacher, beta=beta, temperature=0.8)
    op = loss_and_rows(linear_topk_divergence, teacher, beta=beta, temperature=0.8, chunk_rows=4, backend=backend)
    assert_no_worse_than(
        naive=value_and_grads(spec, *x[:2]),
        got=value_and_grads(op, *x[:2]),
        truth=value_and_grads(spec, *double(x[:2])),
        slack=3e-6,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_stored_are_the_whole_teacher(beta, backend):
    hidden, weight, teacher_hidden, teacher_weight, target = heads(6, 4, 13, 5, dtype=torch.float64)
    teacher = linear_top_tokens(teacher_hidden, teacher_weight, 13)
    assert (teacher.tail == -math.inf).all()
    options = {"beta": beta, "target": target, "alpha": 0.3}
    whole = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, **options)
    got = linear_topk_divergence(hidden, weight, teacher, **options, backend=backend)
    torch.testing.assert_close(got.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.divergence, whole.divergence, rtol=1e-11, atol=0)
    torch.testing.assert_close(got.stats.logprob, whole.stats.logprob)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_fewer_tokens_never_see_more_divergence(beta):
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(dtype=torch.float64)
    whole = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, beta=beta).divergence
    found = [
        linear_topk_divergence(
            hidden, weight, linear_top_tokens(teacher_hidden, teacher_weight, k), beta=beta
        ).divergence
        for k in (1, 8, 64, 509)
    ]
    for fewer, more in zip(found, [*found[1:], whole], strict=True):
        assert (fewer <= more * (1 + 1e-12)).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck_with_every_option(beta, backend):
    hidden, weight, teacher_hidden, teacher_weight, target = heads(5, 3, 7, 4, torch.float64)
    teacher = linear_top_tokens(teacher_hidden, teacher_weight, 3, valid_vocab=6)
    target[2] = -100

    def loss(h, w, b):
        return linear_topk_divergence(
            h,
            w,
            teacher,
            beta=beta,
            target=target % 5,
            alpha=0.3,
            bias=b,
            temperature=1.3,
            softcap=2.0,
            logit_scale=1.1,
            valid_vocab=6,
            row_weight=torch.tensor([0.5, 0.0, 1.0, 2.0, 0.1]),
            chunk_rows=2,
            backend=backend,
        ).loss

    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_students_tail_keeps_its_digits(backend):
    # All but e^-30 of the student's mass is on the one stored token: 1 - sum would be 0 in float32.
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[30.0], [0.0], [-1.0]])
    teacher = TopTokens(torch.tensor([[0]]), torch.tensor([[math.log(0.9)]]), torch.tensor([math.log(0.1)]))
    got = value_and_grads(loss_and_rows(linear_topk_divergence, teacher, backend=backend), hidden, weight)
    tail = -30 + math.log(1 + math.exp(-1))
    assert got.values[1].item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - tail), rel=1e-6)
    # d z of the tail's tokens is (q_tail - p_tail) split as the student splits its tail.
    first = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(got.grads[1][:, 0], torch.tensor([0.1, -0.1 * first, -0.1 * (1 - first)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_renormalised_teacher_without_a_tail_and_unused_places(backend):
    hidden, weight, teacher_hidden, teacher_weight, _ = heads(4, 3, 9, 5, dtype=torch.float64)
    top = linear_top_tokens(teacher_hidden, teacher_weight, 3)
    none = torch.full((4,), -math.inf, dtype=torch.float64)
    teacher = TopTokens(top.ids, top.logprob.log_softmax(-1), none)
    p = teacher.logprob.exp()
    logq = (hidden @ weight.t()).log_softmax(-1).gather(-1, top.ids)
    got = linear_topk_divergence(hidden, weight, teacher, backend=backend).divergence
    torch.testing.assert_close(got, (p * (teacher.logprob - logq)).sum(-1))
    unused = torch.arange(9).expand(4, 9)[~torch.zeros(4, 9, dtype=torch.bool).scatter(-1, top.ids, True)]
    unused = unused.view(4, 6)[:, :1]
    padded = TopTokens(torch.cat([top.ids, unused], -1), torch.cat([teacher.logprob, none[:, None]], -1), none)
    torch.testing.assert_close(linear_topk_divergence(hidden, weight, padded, backend=backend).divergence, got)


def test_the_kept_tokens_are_the_teachers_likeliest_with_an_exact_tail():
    _, _, teacher_hidden, teacher_weight, _ = heads(peak=25.0)
    got = linear_top_tokens(teacher_hidden, teacher_weight, 4, chunk_rows=7)
    truth = top_tokens(teacher_hidden, teacher_weight, 4)
    torch.testing.assert_close(got.ids, truth.ids)
    torch.testing.assert_close(got.logprob.double(), truth.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.tail.double(), truth.tail, rtol=1e-5, atol=1e-4)
    assert linear_top_tokens(teacher_hidden[:0], teacher_weight, 4).tail.shape == (0,)
    with pytest.raises(ValueError, match="k must be between 1 and the vocabulary of 509, got 510"):
        linear_top_tokens(teacher_hidden, teacher_weight, 510)


def test_it_costs_the_students_three_products_and_no_rows_times_tokens():
    n, d, v = 256, 4, 100
    hidden, weight, teacher_hidden, teacher_weight, target = heads(n, d, v, 6)
    teacher = linear_top_tokens(teacher_hidden, teacher_weight, 8)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def run():
        linear_topk_divergence(*leaves, teacher, target=target, alpha=0.1, chunk_rows=16).loss.backward()

    assert gemm_flops(run) == 6 * n * d * v
    with MemoryMeter(*leaves, *teacher, target) as meter:
        run()
    assert meter.largest_numel <= max(16 * v, 4 * n)
    assert meter.peak_bytes <= 4 * (5 * 16 * v + 3 * v * d + 8 * n * d)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 3])
def test_no_rows_and_no_weights_leave_zero_gradients(n, backend):
    hidden, weight, *x, _ = heads(n, 4, 7, 5)
    teacher = linear_top_tokens(*x, 2)
    weight = weight.requires_grad_()
    got = linear_topk_divergence(hidden, weight, teacher, row_weight=torch.zeros(n), backend=backend)
    got.loss.backward()
    assert got.loss == 0
    assert (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(4, 2, dtype=torch.int64)}, r"teacher.ids must be \[N,K\] with N=3"),
        ({"ids": torch.full((3, 2), 7)}, r"teacher.ids must be in \[0, 7\), got 7"),
        ({"ids": torch.full((3, 2), -1)}, r"teacher.ids must be in \[0, 7\), got -1"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int32)}, "teacher.ids must be int64"),
        ({"tail": torch.zeros(3, 1)}, r"teacher.tail must be \[N\]"),
        ({"tail": torch.zeros(3, requires_grad=True)}, "teacher.tail is a constant"),
    ],
)
def test_bad_teachers_are_refused_in_one_sentence(change, message):
    teacher = TopTokens(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), torch.zeros(3))._replace(**change)
    with pytest.raises(ValueError, match=message):
        linear_topk_divergence(torch.zeros(3, 4), torch.zeros(7, 4), teacher)
