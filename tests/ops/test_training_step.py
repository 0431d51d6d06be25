"""The waist inside what trainers do around it: GradScaler, checkpointing, a second backward, accumulation."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastrl.ops import linear_cross_entropy, linear_logprob, linear_token_loss
from fastrl.testing import linear_logprob_inputs

N, D, V = 19, 16, 101


def logprob_loss(hidden, weight, target, **options):
    stats = linear_logprob(hidden, weight, target, chunk_rows=5, **options)
    return -(stats.logprob + 0.1 * stats.entropy).mean()


def token_loss(hidden, weight, target, **options):
    def per_row(logprob, entropy, rows):
        return -(logprob + 0.1 * entropy) / N

    return linear_token_loss(hidden, weight, target, per_row, chunk_rows=5, **options).loss


def cross_entropy(hidden, weight, target, **options):
    return linear_cross_entropy(hidden, weight, target, chunk_rows=5, **options)


OPS = pytest.mark.parametrize("op", [logprob_loss, token_loss, cross_entropy])


def leaves(dtype=torch.float32):
    hidden, weight, target = linear_logprob_inputs(N, D, V, dtype=dtype)
    return hidden.requires_grad_(), torch.nn.Parameter(weight), target


@OPS
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-4])
def test_a_grad_scaler_unscales_to_the_gradient_without_one(op, scale):
    hidden, weight, target = leaves()
    expected = torch.autograd.grad(op(hidden, weight, target), weight)[0]
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(op(hidden, weight, target)).backward()
    torch.testing.assert_close(weight.grad, scale * expected, rtol=1e-6, atol=0)  # powers of two round alike
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(before - weight.detach(), expected, rtol=1e-4, atol=1e-6)


@OPS
def test_float16_gradients_too_small_for_float16_survive_under_a_grad_scaler(op):
    hidden, weight, target = leaves(torch.float16)
    exact = weight.detach().double().requires_grad_()
    tiny = 2.0**-18
    (expected,) = torch.autograd.grad(tiny * op(hidden.double(), exact, target), exact)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    scaler.scale(tiny * op(hidden, weight, target)).backward()
    torch.testing.assert_close(
        weight.grad.double() / 2.0**18, expected, rtol=5e-3, atol=float(expected.abs().max()) / 1e3
    )


@OPS
def test_a_grad_scaler_skips_the_step_of_an_overflow(op):
    hidden, weight, target = leaves()
    before = weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(op(hidden, weight, target) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before)
    assert scaler.get_scale() == 2.0**15


@OPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(op, dtype):
    hidden, weight, target = leaves(dtype)
    layer = torch.nn.Parameter(torch.eye(D, dtype=dtype) * 1.5)

    def block(x):
        return op(torch.tanh(x @ layer), weight, target)

    plain = torch.autograd.grad(block(hidden), (hidden, layer, weight))
    again = torch.autograd.grad(checkpoint(block, hidden, use_reentrant=False), (hidden, layer, weight))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@OPS
def test_a_second_backward_through_a_retained_graph_gives_the_same_bits(op):
    hidden, weight, target = leaves()
    loss = op(hidden, weight, target)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3.0 * loss, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(3 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)


@OPS
def test_a_derivative_of_the_gradient_is_refused(op):
    hidden, weight, target = leaves()
    # The upstream gradient of the first is a constant: nothing about it says that a graph is wanted.
    for scale in (torch.tensor(2.0), torch.tensor(2.0, requires_grad=True)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(scale * op(hidden, weight, target), hidden, create_graph=True)


@OPS
def test_accumulated_micro_batches_are_the_batch(op):
    hidden, weight, target = leaves(torch.float64)
    op(hidden, weight, target).backward()
    whole, weight.grad = weight.grad, None
    for part in (slice(0, 7), slice(7, N)):
        share = (part.stop - part.start) / N if op is not token_loss else 1  # token_loss divides by N itself
        (share * op(hidden[part], weight, target[part])).backward()
    torch.testing.assert_close(weight.grad, whole, rtol=1e-12, atol=1e-14)


@OPS
def test_autocast_around_the_op_leaves_its_precision_alone(op):
    hidden, weight, target = leaves()
    plain = op(hidden, weight, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(hidden, weight, target), plain)
