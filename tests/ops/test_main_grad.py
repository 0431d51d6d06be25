"""A weight with Megatron's main_grad takes d weight there, scaled and summed as autograd would."""

from __future__ import annotations

import pytest
import torch

from fastrl.ops import linear_cross_entropy, linear_logprob, linear_token_loss
from fastrl.testing import MemoryMeter, linear_logprob_inputs


def logprob(hidden, weight, target, **options):
    return linear_logprob(hidden, weight, target, **options).logprob.sum()


def token_loss(hidden, weight, target, **options):
    return linear_token_loss(hidden, weight, target, lambda lp, ent, rows: -lp - 0.1 * ent, **options).loss


OPS = pytest.mark.parametrize("op", [logprob, token_loss, linear_cross_entropy])


def parameters(dtype=torch.float32, buffer_dtype=torch.float32):
    """Two micro-batches and twice the same weight, once with a main_grad that holds ones already."""
    batches = [linear_logprob_inputs(n, 16, 101, dtype=dtype) for n in (9, 14)]
    plain = torch.nn.Parameter(batches[0][1])
    megatron = torch.nn.Parameter(batches[0][1].clone())
    megatron.main_grad = torch.ones(101, 16, dtype=buffer_dtype)
    return [(hidden, target) for hidden, _, target in batches], plain, megatron


@OPS
@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.float64])
def test_micro_batches_and_grad_output_add_up_in_main_grad(op, buffer_dtype):
    batches, plain, megatron = parameters(buffer_dtype=buffer_dtype)
    for scale, (hidden, target) in zip((0.25, -3.0), batches, strict=True):
        grads = []
        for weight in (plain, megatron):
            leaf = hidden.clone().requires_grad_()
            (scale * op(leaf, weight, target, valid_vocab=101, chunk_rows=5)).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)
    assert megatron.grad is None
    torch.testing.assert_close(megatron.main_grad, 1 + plain.grad.to(buffer_dtype), rtol=1e-5, atol=1e-6)


@OPS
def test_padded_rows_of_main_grad_stay_as_they_are(op):
    batches, plain, megatron = parameters()
    hidden, target = batches[0]
    for weight in (plain, megatron):
        op(hidden, weight, target % 90, valid_vocab=90).backward()
    torch.testing.assert_close(megatron.main_grad, 1 + plain.grad)
    assert torch.equal(megatron.main_grad[90:], torch.ones(11, 16))


@OPS
def test_a_bfloat16_weight_keeps_what_bfloat16_gradients_would_round_away(op):
    batches, plain, megatron = parameters(torch.bfloat16)
    exact = plain.detach().double().requires_grad_()
    for hidden, target in batches:
        op(hidden, megatron, target).backward()
        op(hidden.double(), exact, target).backward()
    # On CPU operands are upcast, so nothing but float32 sums is left of the error.
    tolerance = 1e-2 if op is logprob else 1e-5  # logprob keeps its probabilities in bfloat16
    torch.testing.assert_close(megatron.main_grad.double() - 1, exact.grad, rtol=tolerance, atol=tolerance)


@OPS
def test_a_second_backward_adds_the_same_again(op):
    batches, _, megatron = parameters()
    hidden, target = batches[0]
    loss = op(hidden, megatron, target)
    loss.backward(retain_graph=True)
    once = megatron.main_grad - 1
    loss.backward()
    torch.testing.assert_close(megatron.main_grad - 1, 2 * once)


@OPS
def test_megatrons_flag_is_set_and_its_hooks_run_on_zeros(op):
    batches, plain, megatron = parameters()
    megatron.grad_added_to_main_grad = False
    seen = []
    megatron.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    hidden, target = batches[0]
    for weight in (plain, megatron):
        op(hidden, weight, target).backward()
    assert megatron.grad_added_to_main_grad
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.zeros(101, 16))
    torch.testing.assert_close(megatron.main_grad, 1 + plain.grad)


@OPS
def test_a_frozen_weights_buffer_is_left_alone(op):
    batches, _, megatron = parameters()
    hidden, target = batches[0]
    op(hidden.requires_grad_(), megatron.requires_grad_(False), target).backward()
    assert torch.equal(megatron.main_grad, torch.ones(101, 16))


def test_logprob_sums_in_the_buffer_without_memory_of_its_own():
    hidden, weight, target = linear_logprob_inputs(8, 64, 500)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros(500, 64)
    with MemoryMeter(hidden, weight, target, weight.main_grad) as meter:
        logprob(hidden, weight, target, chunk_rows=4).backward()
    assert meter.largest_numel < 500 * 64
    assert weight.main_grad.abs().max() > 0


def test_a_buffer_of_another_shape_is_refused():
    hidden, weight, target = linear_logprob_inputs(2, 4, 7)
    weight.main_grad = torch.zeros(7 * 4)
    with pytest.raises(ValueError, match=r"main_grad must be \[7, 4\]"):
        linear_cross_entropy(hidden, weight, target)
