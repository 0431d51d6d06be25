"""Statistics of logits that exist: equal to plain autograd, without its N x V temporaries."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastrl.ops import linear_logprob, logits_logprob
from fastrl.ops.logits_logprob import reference
from fastrl.testing import MemoryMeter, assert_no_worse_than, double, value_and_grads

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperature per row": {"temperature": torch.linspace(0.5, 2.0, 23)},
    "softcap, scale": {"softcap": 2.0, "logit_scale": 1.3, "temperature": 0.7},
    "padded vocabulary": {"valid_vocab": 400},
}


def inputs(dtype=torch.float32, n=23, v=509):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n, v, generator=generator)).to(dtype)
    target = torch.randint(400, (n,), generator=generator) % v
    return logits, target


@pytest.mark.parametrize("chunk_rows", [4, None])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_no_worse_than_plain_autograd(dtype, options, chunk_rows):
    logits, target = inputs(dtype)
    target[2] = -100
    logits[5, 100:200] = -math.inf
    target[5] = 7
    spec = partial(reference, **OPTIONS[options])
    assert_no_worse_than(
        naive=value_and_grads(spec, logits, target),
        got=value_and_grads(partial(logits_logprob, chunk_rows=chunk_rows, **OPTIONS[options]), logits, target),
        truth=value_and_grads(spec, *double((logits, target))),
        slack=1e-13 if dtype == torch.float64 else 2e-6,
    )


def test_it_agrees_with_the_waist_over_an_identity_head():
    logits, target = inputs(torch.float64, n=7, v=30)
    eye = torch.eye(30, dtype=torch.float64)
    a = value_and_grads(partial(logits_logprob, temperature=0.9), logits, target)
    b = value_and_grads(lambda z, t: linear_logprob(z, eye, t, temperature=0.9), logits, target)
    torch.testing.assert_close(tuple(a), tuple(b), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_few_rows_keep_the_graph_connected(n, backend):
    logits, target = inputs(torch.float64, n=n, v=5)
    logits.requires_grad_()
    stats = logits_logprob(logits, target, backend=backend)
    stats.logprob.sum().backward()
    assert logits.grad.shape == (n, 5)


def test_gradcheck_in_float64():
    logits, target = inputs(torch.float64, n=4, v=6)
    op = partial(logits_logprob, target=target, softcap=4.0, temperature=0.6, chunk_rows=3)
    assert torch.autograd.gradcheck(lambda z: tuple(op(z)), [logits.requires_grad_()])


def test_only_the_gradient_is_as_large_as_the_logits_and_the_logits_survive():
    logits, target = inputs(n=512, v=300)
    before = logits.clone()
    logits.requires_grad_()
    with MemoryMeter(logits, target) as meter:
        stats = logits_logprob(logits, target, chunk_rows=16)
        (stats.logprob - stats.entropy).sum().backward()
    assert meter.peak_bytes < 4 * (512 * 300 + 5 * 16 * 300 + 20 * 512)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


def test_noncontiguous_logits_are_read_in_place():
    logits, target = inputs(torch.float64, n=6, v=20)
    wide = logits.repeat_interleave(2, dim=1)[:, ::2]
    a, b = value_and_grads(logits_logprob, logits, target), value_and_grads(logits_logprob, wide, target)
    torch.testing.assert_close(tuple(a), tuple(b), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(3, 2, 7), {}, r"logits must be \[N,V\], got shape \(3, 2, 7\)"),
        (torch.zeros(3, 7, dtype=torch.int64), {}, "logits must be floating point"),
        (torch.zeros(3, 0), {}, "must not be empty"),
        (torch.zeros(3, 7), {"valid_vocab": 0}, "valid_vocab must be between 1 and V=7"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(logits, options, message):
    with pytest.raises(ValueError, match=message):
        logits_logprob(logits, torch.zeros(3, dtype=torch.int64), **options)
