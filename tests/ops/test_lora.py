"""A low-rank head: gradients of its two thin factors without anything of the head's size."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastrl.ops import Lora, linear_cross_entropy, linear_logprob, linear_token_loss
from fastrl.testing import MemoryMeter, assert_no_worse_than, double, gemm_flops, linear_logprob_inputs, value_and_grads

N, D, V, R = 37, 16, 509, 4
ROW_WEIGHT = (torch.arange(N) % 3).double() / N
MAP = {"softcap": 2.0, "logit_scale": -1.3, "temperature": torch.linspace(0.5, 2.0, N), "valid_vocab": 400}


def logprob(hidden, weight, a, b, bias, target, **options):
    return tuple(linear_logprob(hidden, weight, target, bias=bias, lora=Lora(a, b, 0.5), **options))


def token_loss(hidden, weight, a, b, bias, target, **options):
    def clipped(logprob, entropy, rows):
        return torch.where(rows % 2 == 0, logprob.square(), 0) - 0.1 * entropy * (rows % 4 == 0)

    result = linear_token_loss(hidden, weight, target, clipped, bias=bias, lora=Lora(a, b, 0.5), **options)
    return result.loss, *result.stats


def cross_entropy(hidden, weight, a, b, bias, target, **options):
    smoothed = {"label_smoothing": 0.1, "z_loss": 1e-2}
    return linear_cross_entropy(hidden, weight, target, bias=bias, lora=Lora(a, b, 0.5), **smoothed, **options)


def inputs(dtype, adapter_dtype=None):
    generator = torch.Generator().manual_seed(1)
    hidden, weight, target = linear_logprob_inputs(N, D, V, dtype=dtype)
    a = (torch.randn(R, D, generator=generator, dtype=torch.float64) / D**0.5).to(adapter_dtype or dtype)
    b = torch.randn(V, R, generator=generator, dtype=torch.float64).to(adapter_dtype or dtype)
    return hidden, weight, a, b, torch.linspace(-1, 1, V, dtype=dtype), (target % 400).index_fill(0, target[:2] * 0, -1)


@pytest.mark.parametrize("options", [{}, MAP], ids=["plain", "capped, padded"])
@pytest.mark.parametrize("op", [logprob, token_loss, cross_entropy])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_no_worse_than_with_the_merged_weight(dtype, op, options):
    x = inputs(dtype)
    spec = partial(op, backend="reference", **options)
    assert_no_worse_than(
        naive=value_and_grads(spec, *x),
        got=value_and_grads(partial(op, chunk_rows=11, **options), *x),
        truth=value_and_grads(spec, *double(x)),
        slack=1e-12 if dtype == torch.float64 else 3e-6,
    )


RECOMPUTED = partial(logprob, cache_gib=0.0)  # Triton's interpreter truncates bfloat16 where it keeps probabilities


@pytest.mark.parametrize("op", [RECOMPUTED, partial(token_loss, row_weight=ROW_WEIGHT), cross_entropy])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_float32_adapter_beside_a_bfloat16_head_trains_alone(op, backend):
    x = inputs(torch.bfloat16, torch.float32)
    spec = partial(op, backend="reference")
    assert_no_worse_than(
        naive=value_and_grads(spec, *x, differentiable=(0, 2, 3)),
        got=value_and_grads(partial(op, backend=backend), *x, differentiable=(0, 2, 3)),
        truth=value_and_grads(spec, *double(x), differentiable=(0, 2, 3)),
        slack=3e-6,
    )


def test_a_gradient_a_reader_can_check():
    # logits (0, x) with x = 2 a b: p = softmax; with a = b = 1, x = 2 and d x = p - 1 for target 1.
    a, b = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [1.0]], requires_grad=True)
    linear_cross_entropy(torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([1]), lora=Lora(a, b, 2.0)).backward()
    slope = torch.tensor(2.0).sigmoid() - 1
    torch.testing.assert_close(a.grad, 2 * slope.reshape(1, 1))
    torch.testing.assert_close(b.grad, 2 * torch.stack([-slope, slope]).reshape(2, 1))


@pytest.mark.parametrize("op", [logprob, token_loss, cross_entropy])
def test_nothing_of_the_heads_size_is_made_and_no_product_of_its_gradient(op):
    n, d, v = 32, 128, 1000
    hidden, weight, target = linear_logprob_inputs(n, d, v)
    a, b = torch.randn(2, d, generator=torch.Generator().manual_seed(0)), torch.ones(v, 2)
    leaves = [x.requires_grad_() for x in (hidden, a, b)]

    def step():
        values = op(leaves[0], weight, leaves[1], leaves[2], None, target, chunk_rows=8)
        (values if isinstance(values, torch.Tensor) else values[0].sum()).backward()

    with MemoryMeter(weight, *leaves, target) as meter:
        step()
    assert meter.largest_numel <= 8 * v + v < v * d / 4
    unit = 2 * n * d * v  # logits, d hidden; thin products are 2 of 128 columns wide
    # Probabilities are kept, so nothing is recomputed; half of the rows of the token loss have no gradient.
    assert 1.5 * unit < gemm_flops(step) < 2.2 * unit


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, a, b, _, target = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"lora\.b must be \[V,r\] with V=509"):
        linear_logprob(hidden, weight, target, lora=Lora(a, b[1:]))
    with pytest.raises(ValueError, match=r"lora\.b must be \[V,r\] with r=4"):
        linear_cross_entropy(hidden, weight, target, lora=Lora(a, b[:, 1:]))
    with pytest.raises(ValueError, match="batch_invariant has no fixed tiles for lora"):
        linear_logprob(hidden, weight, target, lora=Lora(a, b), batch_invariant=True, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("op", [logprob, token_loss, cross_entropy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_values_and_gradients_are_no_worse_than_with_the_merged_weight(dtype, op):
    x = [y.cuda() for y in inputs(dtype)]
    spec = partial(op, backend="reference")
    assert_no_worse_than(
        naive=value_and_grads(spec, *x),
        got=value_and_grads(partial(op, chunk_rows=11), *x),
        truth=value_and_grads(spec, *double(x)),
        slack=1e-5 if dtype == torch.float32 else 2e-3,
    )
