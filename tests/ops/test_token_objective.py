"""The policy objective against a NumPy oracle in float64, value and derivative (by central differences)."""

from __future__ import annotations

from math import exp, inf, log, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.ops.token_objective import Kl, token_objective

BACKENDS = ("reference", "torch", "triton")


def oracle(logprob, old, ref, mu, entropy, advantage, o):
    """Loss of one token, written after the definition in the docstring of `token_objective`."""
    r = exp(logprob - old)
    surrogate = max(-min(r, o["delta"]) * advantage, -min(max(r, 1 - o["clip_low"]), 1 + o["clip_high"]) * advantage)
    if advantage < 0:
        surrogate = min(surrogate, -o["dual_clip"] * advantage)
    rho = exp(old - mu)
    correction = min(rho, o["correction_cap"]) if o["correction_low"] <= rho <= o["correction_high"] else 0.0
    d = logprob - ref
    kl = {Kl.K1: d, Kl.K2: d * d / 2, Kl.K3: exp(-d) + d - 1}[o["kl"]]
    return correction * surrogate + o["kl_coef"] * kl - o["entropy_coef"] * entropy


def columns(seed, size, dtype):
    random = np.random.default_rng(seed)
    logprob, old, ref, mu, advantage = (random.normal(size=size) * s for s in (0.5, 0.5, 0.5, 0.5, 1.0))
    entropy = random.random(size)
    advantage[random.random(size) < 0.1] = 0.0
    # Rounded to the dtype first, so that the oracle sees the same numbers.
    return [torch.tensor(x, dtype=dtype) for x in (logprob, old, ref, mu, entropy, advantage)]


def call(tensors, weight, options, backend):
    logprob, old, ref, mu, entropy, advantage = tensors
    return token_objective(
        logprob, old, ref, advantage, weight, sampler_logprob=mu, entropy=entropy, backend=backend, **options
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.integers(0, 17),
    seed=st.integers(0, 9999),
    clip=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 5.0)]),
    dual_clip=st.sampled_from([inf, 1.5, 3.0]),
    delta=st.sampled_from([inf, 1.1, 2.0]),
    kl=st.sampled_from(list(Kl)),
    kl_coef=st.sampled_from([0.0, 0.05]),
    correction=st.sampled_from([(2.0, 0.0, inf), (1.1, 0.0, inf), (inf, 0.8, 1.3)]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
    backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_value_and_derivative_are_the_definition_s(
    size, seed, clip, dual_clip, delta, kl, kl_coef, correction, entropy_coef, backend, dtype
):
    options = {
        "clip_low": clip[0],
        "clip_high": clip[1],
        "dual_clip": dual_clip,
        "delta": delta,
        "kl": kl,
        "kl_coef": kl_coef,
        "correction_cap": correction[0],
        "correction_low": correction[1],
        "correction_high": correction[2],
        "entropy_coef": entropy_coef,
    }
    tensors = columns(seed, size, dtype)
    logprob, entropy = tensors[0].requires_grad_(), tensors[4].requires_grad_()
    got = call(tensors, torch.ones(size), options, backend)
    got.loss.sum().backward()

    rows = np.array([x.detach().double().numpy() for x in tensors]).T
    step = 1e-6
    expected, slope = np.zeros(size), np.zeros(size)
    for i, (a, *rest) in enumerate(rows):
        expected[i] = oracle(a, *rest, options)
        slope[i] = (oracle(a + step, *rest, options) - oracle(a - step, *rest, options)) / (2 * step)
    tight, loose = (1e-12, 1e-6) if dtype == torch.float64 else (2e-6, 5e-6)
    np.testing.assert_allclose(got.loss.detach(), expected, rtol=tight, atol=tight)
    np.testing.assert_allclose(got.d_logprob, slope, rtol=loose, atol=loose)
    assert got.loss.dtype == got.d_logprob.dtype == dtype
    torch.testing.assert_close(logprob.grad, got.d_logprob)
    torch.testing.assert_close(entropy.grad, torch.full_like(entropy, -entropy_coef))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_stops_where_the_clip_binds_and_only_there(backend):
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    zeros = torch.zeros(6)
    got = token_objective(ratio.log(), zeros, None, advantage, torch.ones(6), clip_high=0.28, backend=backend)
    torch.testing.assert_close(got.loss, torch.tensor([-0.5, -1.0, -1.28, 0.8, 1.0, 1.5]))
    torch.testing.assert_close(got.d_logprob, torch.tensor([-0.5, -1.0, 0.0, 0.0, 1.0, 1.5]))
    assert got.clipped_high.tolist() == [False, False, True, False, False, False]
    assert got.clipped_low.tolist() == [False, False, False, True, False, False]
    torch.testing.assert_close(got.ratio, ratio)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_clip_and_delta_bound_a_negative_token_that_became_likely(backend):
    log_ratio, minus = torch.tensor([2.0, 10.0]).log(), torch.tensor([-1.0, -1.0])
    dual = token_objective(log_ratio, torch.zeros(2), None, minus, torch.ones(2), dual_clip=3.0, backend=backend)
    assert dual.dual_clipped.tolist() == [False, True]
    torch.testing.assert_close(dual.loss, torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(dual.d_logprob, torch.tensor([2.0, 0.0]))
    delta = token_objective(log_ratio, torch.zeros(2), None, minus, torch.ones(2), delta=4.0, backend=backend)
    torch.testing.assert_close(delta.loss, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(delta.d_logprob, torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_caps_the_sampler_correction_and_a_mask_drops_it_but_not_the_kl(backend):
    mu, zeros, ones = -torch.tensor([1.5, 4.0]).log(), torch.zeros(2), torch.ones(2)
    truncated = token_objective(zeros, zeros, None, ones, ones, sampler_logprob=mu, correction_cap=2.0, backend=backend)
    torch.testing.assert_close(truncated.loss, torch.tensor([-1.5, -2.0]))
    masked = token_objective(
        zeros,
        zeros,
        zeros - log(2),
        ones,
        ones,
        sampler_logprob=mu,
        correction_cap=inf,
        correction_low=0.5,
        correction_high=3.0,
        kl=Kl.K1,
        kl_coef=1.0,
        backend=backend,
    )
    torch.testing.assert_close(masked.loss, torch.tensor([log(2) - 1.5, log(2)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_can_show_one_estimator_and_follow_another(backend):
    logprob = torch.tensor([log(2.0)], requires_grad=True)
    zero = torch.zeros(1)
    got = token_objective(
        logprob, logprob.detach(), zero, zero, torch.ones(1), kl=Kl.K3, kl_gradient=Kl.K2, kl_coef=1.0, backend=backend
    )
    got.loss.sum().backward()
    torch.testing.assert_close(got.loss.detach(), torch.tensor([0.5 + log(2) - 1]))
    torch.testing.assert_close(got.kl, got.loss.detach())
    torch.testing.assert_close(logprob.grad, torch.tensor([log(2)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("place", range(6))
def test_a_token_that_is_not_finite_is_counted_and_leaves_no_trace(backend, bad, place):
    tensors = columns(1, 4, torch.float32)
    weight = torch.tensor([1.0, 0.5, 0.0, 0.5])
    options = {"kl": Kl.K1, "kl_coef": 0.1, "entropy_coef": 0.1}  # K1 has a slope even where all is 0
    clean = call(tensors, weight, options, backend)
    tensors[place][1] = bad  # trained
    tensors[place][2] = bad  # not trained: nobody's business
    logprob, entropy = tensors[0].requires_grad_(), tensors[4].requires_grad_()
    got = call(tensors, weight, options, backend)
    got.loss.sum().backward()
    assert got.nonfinite.tolist() == [False, True, False, False]
    for field, value in got._asdict().items():
        assert not value[1:3].any() or field == "nonfinite"
        if field != "nonfinite":
            torch.testing.assert_close(value[[0, 3]], clean._asdict()[field][[0, 3]])
    assert logprob.grad[1:3].tolist() == entropy.grad[1:3].tolist() == [0.0, 0.0]
    assert logprob.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_log_ratio_is_held_and_pushes_no_further(backend):
    logprob = torch.tensor([300.0, 19.0], requires_grad=True)
    minus = torch.tensor([-1.0, -1.0])
    got = token_objective(logprob, torch.zeros(2), None, minus, torch.ones(2), backend=backend)
    got.loss.sum().backward()
    torch.testing.assert_close(got.loss.detach(), torch.tensor([exp(20), exp(19)]))
    torch.testing.assert_close(logprob.grad, torch.tensor([0.0, exp(19)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_log_probabilities_are_computed_in_f32(backend):
    logprob = torch.tensor([-1.0, -2.0]).bfloat16().requires_grad_()
    got = token_objective(logprob, torch.tensor([-1.1, -2.1]), None, torch.ones(2), torch.ones(2), backend=backend)
    got.loss.sum().backward()
    torch.testing.assert_close(got.loss.detach(), torch.full((2,), -exp(0.1)))
    assert logprob.grad.dtype == torch.bfloat16


def test_a_weighted_upstream_gradient_scales_the_derivative_without_changing_it():
    tensors = columns(2, 5, torch.float64)
    logprob = tensors[0].requires_grad_()
    got = call(tensors, torch.ones(5), {}, "torch")
    before = got.d_logprob.clone()
    share = torch.arange(5.0, dtype=torch.float64)
    (share * got.loss).sum().backward(retain_graph=True)
    torch.testing.assert_close(logprob.grad, share * before)
    (share * got.loss).sum().backward()
    torch.testing.assert_close(logprob.grad, 2 * share * before)
    torch.testing.assert_close(got.d_logprob, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": 0.1}, "needs ref_logprob"),
        ({"entropy_coef": 0.1}, "needs entropy"),
        ({"correction_low": 0.5}, "needs? sampler_logprob"),
        ({"log_ratio_clamp": 100.0}, "log_ratio_clamp"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"correction_cap": 0.0}, "correction_cap"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(options, message):
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        token_objective(ones, ones, None, ones, ones, **options)


def test_a_column_of_another_length_is_named():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="advantage must be"):
        token_objective(ones, ones, None, torch.ones(3), ones)
