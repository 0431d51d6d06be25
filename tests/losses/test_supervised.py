from __future__ import annotations

import math

import pytest
import torch

from fastrl.losses.supervised import dft, label_smoothed, nll

ROWS = torch.arange(3)
LOGPROB = torch.tensor([math.log(0.5), math.log(0.1), math.log(0.99)], dtype=torch.float64)


def test_nll_pushes_every_token_alike() -> None:
    logprob = LOGPROB.clone().requires_grad_()
    loss = nll(logprob, torch.zeros(3), ROWS)
    (slope,) = torch.autograd.grad(loss.sum(), logprob)
    assert loss.tolist() == pytest.approx([math.log(2), math.log(10), -math.log(0.99)])
    assert slope.tolist() == [-1.0] * 3


def test_dft_pushes_by_the_tokens_own_probability() -> None:
    logprob = LOGPROB.clone().requires_grad_()
    loss = dft(logprob, torch.zeros(3), ROWS)
    (slope,) = torch.autograd.grad(loss.sum(), logprob)
    assert loss.tolist() == pytest.approx([0.5 * math.log(2), 0.1 * math.log(10), -0.99 * math.log(0.99)])
    assert slope.tolist() == pytest.approx([-0.5, -0.1, -0.99])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 8, 3])
    logp = logits.log_softmax(-1)
    ours = label_smoothed(logp.gather(1, target[:, None])[:, 0], logp.mean(-1), smoothing=smoothing)
    theirs = torch.nn.functional.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)
