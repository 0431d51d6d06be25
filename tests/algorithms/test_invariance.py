"""What must not change a loss or a gradient: how the step is cut, ordered and chunked, and what is left out of it."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fastrl.algorithms import PolicyGradient, has_signal, policy_loss, policy_loss_from_logprob
from fastrl.types import Head
from tests.algorithms.algorithms import NAMED
from tests.algorithms.steps import LENGTH, Step, columns, distribution, make_head, make_step, pack

EVERYTHING = list(range(len(LENGTH)))
assert_same = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)  # float64, summed in another order


def accumulated(
    algorithm: PolicyGradient, head: Head, step: Step, cuts: list[list[int]], *, has_old: bool, chunk_rows: int | None
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Loss and head gradient summed over micro-batches; hidden gradients by sequence."""
    loss, d_weight = torch.zeros((), dtype=torch.float64), torch.zeros_like(head.weight)
    d_hidden: dict[int, Tensor] = {}
    for order in cuts:
        hidden, batch = pack(algorithm, step, order, has_old=has_old)
        output = policy_loss(algorithm, hidden, head, batch, chunk_rows=chunk_rows)
        grads = torch.autograd.grad(output.loss, (head.weight, hidden))
        loss, d_weight = loss + output.loss.detach(), d_weight + grads[0]
        d_hidden.update(zip(order, grads[1].split([LENGTH[s] for s in order]), strict=True))
    return loss, d_weight, d_hidden


def materialised(
    algorithm: PolicyGradient, head: Head, step: Step, order: list[int], *, has_old: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, head gradient and hidden gradient through logits that exist."""
    hidden, batch = pack(algorithm, step, order, has_old=has_old)
    logp = distribution(hidden, head)
    logprob, entropy = logp.gather(1, batch.target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    loss = policy_loss_from_logprob(algorithm, logprob, entropy, batch).loss
    return (loss.detach(), *torch.autograd.grad(loss, (head.weight, hidden)))  # type: ignore[return-value]


@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_any_cut_order_and_chunk_gives_the_materialised_loss_and_gradients(name: str, has_old: bool) -> None:
    algorithm = NAMED[name][0]
    head = make_head()
    step = make_step(head)
    loss, d_weight, d_hidden = materialised(algorithm, head, step, EVERYTHING, has_old=has_old)
    expected = dict(zip(EVERYTHING, d_hidden.split(LENGTH), strict=True))
    shuffled = random.Random(3).sample(EVERYTHING, len(EVERYTHING))
    for cuts, chunk_rows in (
        ([EVERYTHING], None),
        ([EVERYTHING], 3),
        ([shuffled], 5),
        ([[s] for s in EVERYTHING], None),
        ([shuffled[:2], shuffled[2:3], shuffled[3:]], 1),
    ):
        got = accumulated(algorithm, head, step, cuts, has_old=has_old, chunk_rows=chunk_rows)
        assert_same(got[0], loss)
        assert_same(got[1], d_weight)
        for s in EVERYTHING:
            assert_same(got[2][s], expected[s])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["grpo", "gspo_wide", "open_instruct", "everything"])
def test_every_part_of_the_head_gets_the_materialised_gradient(name: str, backend: str) -> None:
    algorithm = NAMED[name][0]
    head = make_head(plain=False)
    assert head.bias is not None
    step = make_step(head)
    hidden, batch = pack(algorithm, step, EVERYTHING)
    logp = distribution(hidden, head)
    logprob, entropy = logp.gather(1, batch.target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    slow = policy_loss_from_logprob(algorithm, logprob, entropy, batch)
    fast = policy_loss(algorithm, hidden, head, batch, backend=backend)
    leaves = (hidden, head.weight, head.bias)
    assert_same(fast.loss, slow.loss)
    for a, b in zip(torch.autograd.grad(fast.loss, leaves), torch.autograd.grad(slow.loss, leaves), strict=True):
        assert_same(a, b)
    assert fast.metrics.keys() == slow.metrics.keys()
    for metric, values in slow.metrics.items():
        assert_same(fast.metrics[metric], values, msg=metric)


@pytest.mark.parametrize("name", NAMED)
def test_float32_agrees_with_float64_to_its_own_precision(name: str) -> None:
    algorithm = NAMED[name][0]
    head = make_head()
    step = make_step(head)
    loss, d_weight, _ = materialised(algorithm, head, step, EVERYTHING, has_old=True)
    single = Head(head.weight.detach().float().requires_grad_())
    hidden, batch = pack(algorithm, step, EVERYTHING, precision=torch.float32)
    output = policy_loss(algorithm, hidden, single, batch)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, single.weight)[0].double(), d_weight, rtol=1e-4, atol=1e-5
    )


def with_signal(algorithm: PolicyGradient, step: Step) -> list[int]:
    advantage, _ = columns(algorithm, step)
    return [s for s in EVERYTHING if bool(has_signal(algorithm, advantage[s])[step.trained[s]].any())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMED)
def test_sequences_without_signal_can_be_dropped_and_the_sum_stays_the_same_bit_for_bit(
    name: str, dtype: torch.dtype
) -> None:
    algorithm = NAMED[name][0]
    head = make_head()
    step = make_step(head)
    kept = with_signal(algorithm, step)
    assert kept == ([0, 1, 2, 3, 4] if algorithm.kl is None else [0, 1, 2, 3, 4, 5, 6])
    values = torch.randn(2, sum(LENGTH), generator=torch.Generator().manual_seed(1), dtype=dtype)
    losses, gradients = [], []
    for order in (EVERYTHING, kept):
        _, batch = pack(algorithm, step, order, precision=dtype)
        logprob, entropy = (torch.cat([x.split(LENGTH)[s] for s in order]).requires_grad_() for x in -values.abs())
        loss = policy_loss_from_logprob(algorithm, logprob, entropy, batch).loss
        (gradient,) = torch.autograd.grad(loss, logprob)
        losses.append(loss)
        gradients.append(gradient[batch.weight != 0][gradient[batch.weight != 0] != 0])
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NAMED)
def test_sequences_without_signal_can_be_dropped_and_the_model_gets_the_same_gradient(name: str) -> None:
    algorithm = NAMED[name][0]
    head = make_head()
    step = make_step(head)
    cuts = [with_signal(algorithm, step)]
    whole = accumulated(algorithm, head, step, [EVERYTHING], has_old=True, chunk_rows=None)
    part = accumulated(algorithm, head, step, cuts, has_old=True, chunk_rows=None)
    assert_same(part[:2], whole[:2])
    for s in EVERYTHING:
        assert_same(part[2].get(s, torch.zeros_like(whole[2][s])), whole[2][s])


def test_a_batch_with_nothing_to_train_has_loss_zero_and_a_gradient() -> None:
    algorithm = NAMED["everything"][0]
    head = make_head()
    step = make_step(head)
    for has_old in (True, False):
        hidden, batch = pack(algorithm, step, [7], has_old=has_old)
        loss = policy_loss(algorithm, hidden, head, batch).loss
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, head.weight)[0].any()
        slow = materialised(algorithm, head, step, [7], has_old=has_old)
        assert slow[0] == 0
        assert not slow[1].any()


def test_an_advantage_of_zero_on_a_token_keeps_its_kl_and_the_normaliser() -> None:
    """What a recipe does with `entropy_keep`: the push goes, everything else stays."""
    algorithm = NAMED["grpo_with_kl"][0]
    head = make_head()
    step = make_step(head)
    hidden, batch = pack(algorithm, step, EVERYTHING)
    assert batch.advantage is not None
    silent = policy_loss(algorithm, hidden, head, replace(batch, advantage=torch.zeros_like(batch.advantage)))
    assert algorithm.kl is not None
    expected = (batch.weight.double() * algorithm.kl.coef * silent.metrics["kl"]).sum()
    assert_same(silent.loss, expected)
