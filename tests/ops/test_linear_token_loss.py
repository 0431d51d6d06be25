"""The single pass: the same loss and gradients as autograd through N x V logits, for a third less work and memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.ops import linear_logprob, linear_token_loss
from fastrl.ops.linear_token_loss import reference
from fastrl.testing import MemoryMeter, assert_no_worse_than, double, linear_logprob_inputs, value_and_grads
from tests.ops.test_linear_logprob import DTYPES, OPTIONS, gemm_units, inputs

N = 37
ADVANTAGE = torch.linspace(-1, 1, N, dtype=torch.float64)  # 0 in the middle
OLD_LOGPROB = torch.linspace(-8, -4, N, dtype=torch.float64)
WEIGHT = (torch.arange(N) % 3).double() / N  # a third of the rows are not trained


def clipped(logprob, entropy, rows):
    """PPO's surrogate with an entropy bonus on some rows: gradients of both kinds, and rows without any."""
    ratio = (logprob - OLD_LOGPROB[rows]).exp()
    advantage = ADVANTAGE[rows]
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (surrogate - 0.1 * (rows % 4 == 0) * entropy).to(logprob.dtype)


def nll(logprob, entropy, rows):
    return -logprob


def outputs(function, loss_fn=clipped, **kwargs):
    """The op as a function of its head tensors that returns the loss and the statistics."""

    def call(hidden, weight, target):
        result = function(hidden, weight, target, loss_fn, **kwargs)
        return result.loss, *result.stats

    return call


@pytest.mark.parametrize("chunk_rows", [5, None])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_no_worse_than_plain_autograd(dtype, options, chunk_rows):
    x = inputs(dtype)
    for row_weight in (None, WEIGHT):
        spec = outputs(reference, row_weight=row_weight, **OPTIONS[options])
        got = outputs(linear_token_loss, row_weight=row_weight, chunk_rows=chunk_rows, **OPTIONS[options])
        assert_no_worse_than(
            naive=value_and_grads(spec, *x),
            got=value_and_grads(got, *x),
            truth=value_and_grads(spec, *double(x)),
            slack=1e-12 if dtype == torch.float64 else 3e-6,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bias_with_forbidden_tokens_gives_no_nan(dtype):
    hidden, weight, target = inputs(dtype)
    bias = torch.linspace(-1, 1, 509, dtype=dtype)
    bias[100:300] = -math.inf
    bias[target.clamp(min=0)] = 0.5

    def call(function):
        return lambda h, w, b: function(h, w, target, clipped, bias=b, row_weight=WEIGHT).loss

    x = (hidden, weight, bias)
    got = value_and_grads(call(linear_token_loss), *x)
    assert all(y.isfinite().all() for y in (*got.values, *got.grads))
    assert_no_worse_than(
        naive=value_and_grads(call(reference), *x),
        got=got,
        truth=value_and_grads(call(reference), *double(x)),
        slack=1e-12 if dtype == torch.float64 else 3e-6,
    )


def test_it_is_the_loss_over_linear_logprob():
    hidden, weight, target = inputs(torch.float64)

    def two_steps(h, w):
        stats = linear_logprob(h, w, target, temperature=0.9)
        return (WEIGHT * clipped(stats.logprob, stats.entropy, torch.arange(N))).sum()

    def one_step(h, w):
        return linear_token_loss(h, w, target, clipped, row_weight=WEIGHT, temperature=0.9).loss

    a, b = value_and_grads(two_steps, hidden, weight), value_and_grads(one_step, hidden, weight)
    torch.testing.assert_close(tuple(a), tuple(b), rtol=1e-12, atol=1e-14)


def test_a_loss_a_reader_can_check():
    # Logits log(1), log(3): p = 1/4, 3/4. loss = 2 x -log(3/4), d loss / d logits = 2 (p - onehot).
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    result = linear_token_loss(hidden, weight, torch.tensor([1]), nll, row_weight=torch.tensor([2.0]))
    result.loss.backward()
    torch.testing.assert_close(result.loss.detach(), torch.tensor(-2 * math.log(3 / 4)))
    torch.testing.assert_close(weight.grad, torch.tensor([[0.5], [-0.5]]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.5 * math.log(3)]]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, N), d=st.integers(1, 5), v=st.integers(1, 12), chunk_rows=st.integers(1, 40), weigh=st.booleans()
)
def test_every_shape_and_chunk_size_agrees_with_the_specification(n, d, v, chunk_rows, weigh):
    x = linear_logprob_inputs(n, d, v, dtype=torch.float64)
    row_weight = WEIGHT[:n] if weigh else None
    spec = value_and_grads(outputs(reference, row_weight=row_weight), *x)
    got = value_and_grads(outputs(linear_token_loss, row_weight=row_weight, chunk_rows=chunk_rows), *x)
    assert_no_worse_than(naive=spec, got=got, truth=spec, slack=1e-12)


def test_gradcheck_in_float64():
    hidden, weight, target = linear_logprob_inputs(5, 3, 7, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)

    def call(h, w, b):
        options = {"bias": b, "temperature": 0.7, "softcap": 1.5, "valid_vocab": 6, "chunk_rows": 2}
        return linear_token_loss(h, w, target % 6, lambda lp, ent, rows: lp.square() - ent * lp, **options).loss

    assert torch.autograd.gradcheck(call, [x.clone().requires_grad_() for x in (hidden, weight, bias)])


def test_permuting_rows_with_their_weights_permutes_the_gradient():
    hidden, weight, target = inputs(torch.float64)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))

    def run(index):
        fn = lambda lp, ent, rows: clipped(lp, ent, index[rows])  # noqa: E731
        call = outputs(linear_token_loss, fn, row_weight=WEIGHT[index], chunk_rows=6)
        return value_and_grads(call, hidden[index], weight, target[index])

    plain, mixed = run(torch.arange(N)), run(order)
    torch.testing.assert_close(plain.values[0], mixed.values[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(plain.grads[0][order], mixed.grads[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(plain.grads[1], mixed.grads[1], rtol=1e-12, atol=1e-14)


def test_micro_batches_add_up():
    hidden, weight, target = inputs(torch.float64)
    whole = value_and_grads(outputs(linear_token_loss, row_weight=WEIGHT), hidden, weight, target)
    loss, grad = 0, 0
    for rows in (slice(0, 10), slice(10, N)):
        fn = lambda lp, ent, r, start=rows.start: clipped(lp, ent, r + start)  # noqa: E731
        part = value_and_grads(
            outputs(linear_token_loss, fn, row_weight=WEIGHT[rows]), hidden[rows], weight, target[rows]
        )
        loss, grad = loss + part.values[0], grad + part.grads[1]
    torch.testing.assert_close(loss, whole.values[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad, whole.grads[1], rtol=1e-12, atol=1e-14)


def leaves(n=60, d=8, v=40, dtype=torch.float32):
    return tuple(x.requires_grad_(x.is_floating_point()) for x in linear_logprob_inputs(n, d, v, dtype=dtype))


def test_work_is_three_products_with_a_gradient_and_one_without():
    hidden, weight, target = leaves()
    units = partial(gemm_units, 60, 8, 40)

    def whole():
        linear_token_loss(hidden, weight, target, nll, chunk_rows=20).loss.backward()

    assert units(whole) == 3
    frozen = weight.detach()
    assert units(lambda: linear_token_loss(hidden, frozen, target, nll).loss.backward()) == 2
    assert units(lambda: linear_token_loss(hidden.detach(), weight, target, nll).loss.backward()) == 2
    assert units(lambda: linear_token_loss(hidden.detach(), frozen, target, nll)) == 1
    with torch.no_grad():
        assert units(lambda: linear_token_loss(hidden, weight, target, nll)) == 1


def test_rows_of_weight_zero_never_reach_the_head():
    hidden, weight, target = leaves()
    with torch.no_grad():
        hidden[::2] = math.nan  # would spoil everything it touched
    row_weight = (torch.arange(60) % 2).float()
    result = linear_token_loss(hidden, weight, target, nll, row_weight=row_weight)
    result.loss.backward()
    assert result.loss.isfinite()
    assert weight.grad.isfinite().all()
    assert (hidden.grad[::2] == 0).all()
    assert all((x[::2] == 0).all() for x in result.stats)
    assert gemm_units(60, 8, 40, lambda: linear_token_loss(hidden, weight, target, nll, row_weight=row_weight)) == 1.5


def test_rows_without_a_coefficient_leave_the_gradient_products():
    hidden, weight, target = leaves()
    half = lambda lp, ent, rows: -lp * (rows % 2)  # noqa: E731
    assert gemm_units(60, 8, 40, lambda: linear_token_loss(hidden, weight, target, half)) == 1 + 2 / 2
    linear_token_loss(hidden, weight, target, half).loss.backward()
    assert (hidden.grad[::2] == 0).all()
    assert (hidden.grad[1::2] != 0).any(1).all()


def test_a_nan_coefficient_is_not_mistaken_for_none():
    for skip_tolerance in (0.0, 0.5):
        hidden, weight, target = leaves()
        fn = lambda lp, ent, rows: lp * torch.where(rows == 3, math.nan, 0.0)  # noqa: E731
        linear_token_loss(hidden, weight, target, fn, skip_tolerance=skip_tolerance).loss.backward()
        assert hidden.grad[3].isnan().all()


def test_no_tensor_of_n_times_v_numbers_ever_exists():
    n, v = 512, 300
    hidden, weight, target = leaves(n, 4, v)
    with MemoryMeter(hidden, weight, target) as meter:
        linear_token_loss(hidden, weight, target, nll, chunk_rows=32).loss.backward()
    assert meter.largest_numel <= 32 * v
    assert meter.peak_bytes < 4 * (3 * 32 * v + 4 * (n * 4 + v * 4) + 20 * n)


@pytest.mark.parametrize("tolerance", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("options", ["plain", "temperature per row", "softcap, scale, temperature"])
def test_the_skipped_bound_is_honest_and_within_its_tolerance(tolerance, options):
    # With an identity head d hidden is d logits itself, so the L1 norm of its error is what the bound bounds.
    v = 50
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(N, v, generator=generator)).double()
    target = hidden.argmax(-1).where(torch.arange(N) % 5 > 0, 0)  # confident rows, and some surprised ones
    weight = torch.eye(v, dtype=torch.float64)
    kwargs = {"row_weight": WEIGHT, **OPTIONS[options]}

    def gradient(skip_tolerance):
        leaf = hidden.clone().requires_grad_()
        result = linear_token_loss(leaf, weight, target, clipped, skip_tolerance=skip_tolerance, **kwargs)
        result.loss.backward()
        return leaf.grad, result

    exact, whole = gradient(0.0)
    approximate, result = gradient(tolerance)
    missing = (exact - approximate).abs().sum()
    assert whole.skipped_bound == 0
    assert result.loss == whole.loss
    assert missing <= result.skipped_bound * (1 + 1e-12)
    if options != "softcap, scale, temperature":  # the cap's slope makes the bound loose
        assert result.skipped_bound <= 3 * tolerance * exact.abs().sum()
    if tolerance == 0.5:
        assert missing > 0


def test_confident_rows_are_skipped_for_less_work():
    hidden, weight, target = linear_logprob_inputs(60, 64, 200, peak=25.0)
    hidden[:6] = 0  # six rows know nothing; they carry the gradient
    hidden.requires_grad_()
    weight.requires_grad_()
    units = gemm_units(
        60, 64, 200, lambda: linear_token_loss(hidden, weight, target, nll, skip_tolerance=0.05).loss.backward()
    )
    assert units < 1 + 2 * 0.2


def test_a_second_backward_accumulation_and_scaling_see_the_same_gradients():
    hidden, weight, target = leaves(dtype=torch.float64)
    loss = linear_token_loss(hidden, weight, target, nll).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    twice = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(twice, tuple(3 * x for x in once), rtol=1e-15, atol=0)
    loss.backward(retain_graph=True)
    (0.5 * loss).backward()
    torch.testing.assert_close(hidden.grad, 1.5 * once[0], rtol=1e-14, atol=0)


def test_fp16_gradients_survive_a_loss_scale():
    # d loss / d logit is about 1e-9 per row: 0 in fp16, until the scale of 2^24 has multiplied it.
    x = tuple(t.half() if t.is_floating_point() else t for t in linear_logprob_inputs(60, 8, 40))
    small = torch.full((60,), 1e-9)

    def call(function):
        return lambda h, w: function(h, w, x[2], nll, row_weight=small).loss * 2.0**24

    got = value_and_grads(call(linear_token_loss), *x[:2])
    truth = value_and_grads(call(reference), *double(x[:2]))
    for a, b in zip(got.grads, truth.grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_tensors(dtype):
    hidden, weight, target = leaves(dtype=dtype)
    bias = torch.zeros(40, requires_grad=True)
    result = linear_token_loss(hidden, weight, target, nll, bias=bias)
    result.loss.backward()
    assert (result.loss.dtype, result.stats.logprob.dtype) == (torch.float32, torch.float32)
    assert (hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype, dtype, torch.float32)


def test_statistics_are_detached_and_the_loss_is_not():
    hidden, weight, target = leaves()
    result = linear_token_loss(hidden, weight, target, nll)
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in (*result.stats, result.skipped_bound))
    with torch.no_grad():
        assert not linear_token_loss(hidden, weight, target, nll).loss.requires_grad


@pytest.mark.parametrize("n", [0, 4])
def test_a_constant_loss_and_an_empty_batch_give_zero_gradients(n):
    hidden, weight, target = leaves(n=n)
    result = linear_token_loss(hidden, weight, target, lambda lp, ent, rows: torch.full_like(lp, 2.0))
    result.loss.backward()
    assert result.loss == 2.0 * n
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_a_batch_of_weight_zero_stays_connected():
    hidden, weight, target = leaves(n=4)
    result = linear_token_loss(hidden, weight, target, nll, row_weight=torch.zeros(4))
    result.loss.backward()
    assert result.loss == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loss_over_other_trainable_tensors_is_refused(frozen):
    hidden, weight, target = leaves()
    if frozen:
        hidden, weight = hidden.detach(), weight.detach()
    value = (torch.ones(60, requires_grad=True) * 2).sin()
    with pytest.raises(ValueError, match=r"detach\(\) it, or differentiate linear_logprob"):
        linear_token_loss(hidden, weight, target, lambda lp, ent, rows: -lp * value[rows])
    with torch.no_grad():
        linear_token_loss(hidden, weight, target, lambda lp, ent, rows: -lp * value[rows])


def test_logits_stay_float32_under_autocast():
    hidden, weight, target = leaves()
    plain = linear_token_loss(hidden, weight, target, nll)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_token_loss(hidden, weight, target, nll)
        with torch.no_grad():
            value = linear_token_loss(hidden, weight, target, nll)
    assert inside.loss == plain.loss
    assert value.loss == plain.loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_weight": torch.ones(4)}, r"row_weight must be \[N\] with N=3"),
        ({"row_weight": torch.ones(3, requires_grad=True)}, "row_weight is a constant"),
        ({"skip_tolerance": 1.0}, r"skip_tolerance must be in \[0, 1\)"),
        ({"loss_fn": lambda lp, ent, rows: lp.sum()}, r"one loss per row, shape \(3,\), got shape \(\)"),
        ({"loss_fn": lambda lp, ent, rows: 0.0}, r"one loss per row, shape \(3,\), got float"),
        ({"row_weight": torch.ones(3, device="meta")}, "row_weight is on meta and hidden on cpu"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change, message):
    good = {"target": torch.zeros(3, dtype=torch.int64), "loss_fn": nll}
    with pytest.raises(ValueError, match=message):
        linear_token_loss(torch.zeros(3, 4), torch.zeros(7, 4), **{**good, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_values_and_gradients_are_no_worse_than_plain_autograd(dtype):
    x = linear_logprob_inputs(133, 64, 509, dtype=dtype, device="cuda")
    weight = (torch.arange(133, device="cuda") % 3).float() / 133
    fn = lambda lp, ent, rows: -lp * (rows % 4) - 0.1 * ent  # noqa: E731
    assert_no_worse_than(
        naive=value_and_grads(outputs(reference, fn, row_weight=weight), *x),
        got=value_and_grads(outputs(linear_token_loss, fn, row_weight=weight, backend="torch", chunk_rows=50), *x),
        truth=value_and_grads(outputs(reference, fn, row_weight=weight), *double(x)),
        slack=1e-4,
    )
