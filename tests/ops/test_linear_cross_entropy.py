"""Cross entropy over a head: equal to torch's on materialised logits, with smoothing, z-loss and every head option."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional

from fastrl.ops import linear_cross_entropy
from fastrl.testing import MemoryMeter, assert_no_worse_than, double, gemm_flops, linear_logprob_inputs, value_and_grads

BACKENDS = ["reference", "torch"]


def inputs(dtype=torch.float32):
    hidden, weight, target = linear_logprob_inputs(37, 16, 509, dtype=dtype)
    return hidden, weight, (target % 400).index_fill(0, torch.tensor([3, 36]), -100)


def torch_cross_entropy(hidden, weight, target, *, label_smoothing=0.0):
    return functional.cross_entropy((hidden @ weight.t()).float(), target, label_smoothing=label_smoothing)


def torch_cross_entropy_double(hidden, weight, target, *, label_smoothing=0.0):
    return functional.cross_entropy(hidden @ weight.t(), target, label_smoothing=label_smoothing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torch_cross_entropy(dtype, label_smoothing, backend):
    x = inputs(dtype)
    op = partial(linear_cross_entropy, label_smoothing=label_smoothing, backend=backend, chunk_rows=9)
    assert_no_worse_than(
        naive=value_and_grads(partial(torch_cross_entropy, label_smoothing=label_smoothing), *x),
        got=value_and_grads(op, *x),
        truth=value_and_grads(partial(torch_cross_entropy_double, label_smoothing=label_smoothing), *double(x)),
        slack=1e-6,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_term_against_the_formula(backend):
    hidden, weight, target = inputs(torch.float64)
    token_weight = torch.linspace(0, 1, 37, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 509, dtype=torch.float64)
    eps, z_coefficient, cap = 0.2, 0.01, 3.0

    def formula(h, w, b):
        z = cap * torch.tanh((1.1 * (h @ w.t() + b)[:, :400]) / cap) / 0.8
        lse = z.logsumexp(-1)
        nll = lse - z.gather(-1, target.clamp(min=0)[:, None])[:, 0]
        terms = (1 - eps) * nll + eps * (lse - z.mean(-1)) + z_coefficient * lse.square()
        return (token_weight * (target >= 0) * terms).sum()

    def op(h, w, b):
        return linear_cross_entropy(
            h,
            w,
            target,
            token_weight=token_weight,
            label_smoothing=eps,
            z_loss=z_coefficient,
            bias=b,
            temperature=0.8,
            softcap=cap,
            logit_scale=1.1,
            valid_vocab=400,
            chunk_rows=8,
            backend=backend,
        )

    truth = value_and_grads(formula, hidden, weight, bias)
    assert_no_worse_than(naive=truth, got=value_and_grads(op, hidden, weight, bias), truth=truth, slack=1e-13)


def test_gradcheck_in_float64():
    hidden, weight, target = linear_logprob_inputs(5, 3, 7, dtype=torch.float64)
    op = partial(linear_cross_entropy, target=target, label_smoothing=0.1, z_loss=0.1, chunk_rows=2)
    assert torch.autograd.gradcheck(lambda h, w: op(h, w), [x.requires_grad_() for x in (hidden, weight)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_logits_cost_log_v_whatever_the_smoothing(backend):
    x = torch.zeros(4, 2), torch.zeros(8, 2), torch.arange(4)
    for eps in (0.0, 0.5):
        loss = linear_cross_entropy(*x, label_smoothing=eps, backend=backend)
        torch.testing.assert_close(loss, torch.tensor(math.log(8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_are_neither_computed_nor_counted(backend):
    hidden, weight, target = linear_logprob_inputs(6, 4, 9)
    pad = 8
    target[:4] %= pad
    kept = linear_cross_entropy(hidden[:4], weight, target[:4], backend=backend)
    target[4:] = pad
    hidden[4:] = math.nan
    got = linear_cross_entropy(hidden, weight, target, ignore_index=pad, backend=backend)
    torch.testing.assert_close(got, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 3])
def test_the_mean_of_no_tokens_is_zero_and_stays_connected(n, backend):
    hidden, weight = torch.ones(n, 4, requires_grad=True), torch.ones(7, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((n,), -100), backend=backend)
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()


def test_smoothing_needs_no_further_product_and_no_further_matrix():
    n, d, v = 256, 4, 100
    hidden, weight, target = (x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, d, v))

    def run():
        linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, z_loss=1e-4, chunk_rows=16).backward()

    assert gemm_flops(run) == 6 * n * d * v
    with MemoryMeter(hidden, weight, target) as meter:
        run()
    assert meter.largest_numel <= 16 * v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_the_weight_of_an_ignored_token_is_not_read(broken, backend):
    hidden, weight, target = inputs()
    token_weight = torch.where(target < 0, 0.0, 1.0)
    clean = linear_cross_entropy(hidden, weight, target, token_weight=token_weight, backend=backend)
    token_weight = token_weight.masked_fill(target < 0, broken)
    assert linear_cross_entropy(hidden, weight, target, token_weight=token_weight, backend=backend) == clean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"token_weight": torch.ones(4)}, r"token_weight must be \[N\] with N=3"),
        ({"token_weight": torch.ones(3, requires_grad=True)}, "token_weight is a constant"),
        ({"target": torch.tensor([0, 9, 0])}, "below the vocabulary of 7, got 9"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.zeros(3, 4), torch.zeros(7, 4), **{"target": torch.zeros(3, dtype=torch.int64), **change}
        )
