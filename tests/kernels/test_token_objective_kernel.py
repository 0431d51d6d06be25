"""The fused objective against the specification in float64: values, derivative, facts, and what a GPU must repeat."""

from __future__ import annotations

from functools import partial
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.kernels import token_objective as kernel
from fastrl.ops.token_objective import Kl, token_objective
from fastrl.testing import assert_no_worse_than, double, value_and_grads

PLAIN = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": inf, "delta": inf, "kl": 3, "kl_gradient": 3}
PLAIN |= {"kl_coef": 0.05, "correction_cap": 2.0, "correction_low": 0.0, "correction_high": inf}
PLAIN |= {"entropy_coef": 0.0, "log_ratio_clamp": 20.0}
FACTS = ("clipped_low", "clipped_high", "dual_clipped", "nonfinite")


def columns(size, seed=0, dtype=torch.float32, device="cpu"):
    """logprob, old, ref, mu, advantage, entropy, weight; differences are multiples of 1/64, which lie off the borders.

    A ratio within rounding of a border would be clipped in one precision and not in the other.
    """
    generator = torch.Generator().manual_seed(seed)
    old = (-torch.rand(size, generator=generator) * 3 * 64).round() / 64
    logprob, ref, mu = (old + (20 * torch.randn(size, generator=generator)).round() / 64 for _ in range(3))
    logprob = torch.where(torch.arange(size) % 5 == 1, old, logprob)  # on policy: r is exactly 1
    logprob = torch.where(torch.arange(size) % 17 == 3, old + 30, logprob)  # past the clamp
    advantage = torch.randn(size, generator=generator)
    advantage = torch.where(torch.arange(size) % 7 == 2, 0.0, advantage)
    weight = (torch.arange(size) % 10 != 9).float()
    return [
        x.to(device, dtype) for x in (logprob, old, ref, mu, advantage, torch.rand(size, generator=generator), weight)
    ]


def run(logprob, old, ref, mu, advantage, entropy, weight, *, backend, **options):
    got = token_objective(
        logprob, old, ref, advantage, weight, sampler_logprob=mu, entropy=entropy, backend=backend, **options
    )
    return got.loss, got.d_logprob, got.ratio, got.kl, *(getattr(got, name).to(logprob.dtype) for name in FACTS)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(0, 70),
    seed=st.integers(0, 999),
    clip=st.sampled_from([(0.2, 0.28), (0.0, 0.0), (1.0, 5.0)]),
    dual_clip=st.sampled_from([None, 1.5]),
    delta=st.sampled_from([None, 1.1]),
    kl=st.sampled_from(list(Kl)),
    kl_gradient=st.sampled_from([None, *Kl]),
    correction=st.sampled_from([(2.0, 0.0, inf), (1.1, 0.0, inf), (inf, 0.8, 1.3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_and_gradients_are_no_worse_than_autograd_s(
    size, seed, clip, dual_clip, delta, kl, kl_gradient, correction, dtype
):
    options = {"clip_low": clip[0], "clip_high": clip[1], "dual_clip": dual_clip, "delta": delta, "kl": kl}
    options |= {"kl_gradient": kl_gradient, "kl_coef": 0.05, "entropy_coef": 0.01}
    options |= dict(zip(("correction_cap", "correction_low", "correction_high"), correction, strict=True))
    inputs = columns(size, seed, dtype)
    check = partial(value_and_grads, differentiable=(0, 5))
    assert_no_worse_than(
        naive=check(partial(run, backend="reference", **options), *inputs),
        got=check(partial(run, backend="triton", **options), *inputs),
        truth=check(partial(run, backend="reference", **options), *double(inputs)),
        slack=5e-7 if dtype == torch.float32 else 1e-14,
    )


@pytest.mark.parametrize("present", [(), ("ref",), ("mu",), ("entropy",)])
def test_absent_columns_are_left_out_of_the_sum(present):
    logprob, old, ref, mu, advantage, entropy, weight = columns(33)
    options = {"sampler_logprob": mu if "mu" in present else None, "entropy": entropy if "entropy" in present else None}
    options |= {"entropy_coef": 0.1} if "entropy" in present else {}
    options |= {"kl_coef": 0.1} if "ref" in present else {}
    call = partial(token_objective, logprob, old, ref if "ref" in present else None, advantage, weight, **options)
    for got, expected in zip(call(backend="triton"), call(backend="torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree():
    # k3(d) = d^2/2 - d^3/6 + ...: at d = 1e-3 it is 4.998e-7, where exp(-d) + d - 1 has three digits left in f32.
    d = torch.tensor([1e-3, -1e-3, 1e-2, 0.9, -0.99, 1.01, 5.0])
    zeros, ones = torch.zeros(7), torch.ones(7)
    got = token_objective(d, d, zeros, zeros, ones, kl_coef=1.0, backend="triton")
    exact = torch.expm1(-d.double()) + d.double()
    torch.testing.assert_close(got.kl.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.d_logprob.double(), -torch.expm1(-d.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("place", range(6))
def test_a_token_that_is_not_finite_is_counted_and_leaves_no_trace(bad, place):
    inputs = columns(8)
    inputs[6][2] = 0.0
    for token in (1, 2):
        inputs[place][token] = bad
    logprob, entropy = inputs[0].requires_grad_(), inputs[5].requires_grad_()
    old, ref, mu, advantage, weight = inputs[1], inputs[2], inputs[3], inputs[4], inputs[6]
    options = {"kl": Kl.K1, "kl_coef": 0.1, "entropy_coef": 0.1, "sampler_logprob": mu, "entropy": entropy}
    got = token_objective(logprob, old, ref, advantage, weight, backend="triton", **options)
    got.loss.sum().backward()
    assert got.nonfinite.tolist() == [False, True] + 6 * [False]
    for field, value in got._asdict().items():
        assert field == "nonfinite" or not value[1:3].any()
    assert logprob.grad[1:3].tolist() == entropy.grad[1:3].tolist() == [0.0, 0.0]
    assert entropy.grad[0] == -torch.tensor(0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_log_probabilities_are_computed_in_f32_and_get_a_half_gradient(dtype):
    inputs = columns(20)
    inputs[0] = inputs[0].to(dtype).requires_grad_()
    options = {"kl_coef": 0.1, "entropy_coef": 0.0}
    got = run(*inputs, backend="triton", **options)
    expected = run(*inputs, backend="torch", **options)
    for a, b in zip(got[:4], expected[:4], strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-6, atol=1e-6)
    got[0].sum().backward()
    assert inputs[0].grad.dtype == dtype


def test_masks_integers_and_strided_columns_are_read_as_they_are_meant():
    logprob, old, ref, _, advantage, _, weight = columns(40)
    spread = torch.stack([logprob, old], 1)
    got = token_objective(spread[:, 0], spread[:, 1], ref, advantage, weight != 0, backend="triton")
    expected = token_objective(logprob, old, ref, advantage, weight, backend="triton")
    assert torch.equal(got.loss, expected.loss)
    signs = token_objective(logprob, old, ref, advantage.sign().long(), weight, backend="triton")
    assert torch.equal(signs.loss, token_objective(logprob, old, ref, advantage.sign(), weight, backend="triton").loss)


@pytest.mark.parametrize("tile", kernel.TILES)
def test_a_token_s_result_does_not_depend_on_the_batch_or_the_tile(tile):
    logprob, old, ref, mu, advantage, entropy, weight = columns(600)

    def forward(rows, tile):
        parts = (x[rows].contiguous() for x in (logprob, old, ref, advantage, mu, entropy, weight))
        return kernel.forward(*parts, **PLAIN, tile=tile)

    whole = forward(slice(None), tile)
    for rows in (slice(0, 513), slice(513, 600)):
        for part, expected in zip(forward(rows, kernel.TILES[0]), whole, strict=True):
            assert torch.equal(part, expected[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1937, 1_048_576, 1_048_577])
def test_on_a_gpu_a_step_s_tokens_agree_with_float64_and_repeat_bit_for_bit(dtype, size):
    inputs = columns(size, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cuda")
    inputs[0] = inputs[0].to(dtype)
    options = {"clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.05, "kl_gradient": Kl.K2, "entropy_coef": 0.01}
    check = partial(value_and_grads, differentiable=(0, 5))
    fused = partial(run, backend="triton", **options)
    got = check(fused, *inputs)
    assert_no_worse_than(
        naive=check(partial(run, backend="reference", **options), *inputs),
        got=got,
        truth=check(partial(run, backend="reference", **options), *double(inputs)),
        slack=2e-6 if dtype != torch.float64 else 1e-13,
    )
    again = check(fused, *inputs)
    assert all(torch.equal(a, b) for a, b in zip((*got.values, *got.grads), (*again.values, *again.grads), strict=True))


@pytest.mark.gpu
def test_on_a_gpu_a_new_coefficient_compiles_nothing_new():
    inputs = columns(4096, device="cuda")
    run(*inputs, backend="triton", kl_coef=0.05, entropy_coef=0.01)
    device = torch.cuda.current_device()
    before = len(kernel._objective.device_caches[device][0])
    for step in range(4):
        run(*inputs, backend="triton", kl_coef=0.05 + step / 100, entropy_coef=0.01 * step)
    assert len(kernel._objective.device_caches[device][0]) == before
