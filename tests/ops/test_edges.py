"""Where kernels break, on every backend: odd vocabularies, block borders, rows at their limits, other cuts."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastrl.ops import linear_cross_entropy, linear_logprob, linear_token_loss, logits_logprob
from fastrl.testing import assert_no_worse_than, double, linear_logprob_inputs, value_and_grads
from tests.ops.test_properties import backends

BACKENDS = pytest.mark.parametrize("backend", [*backends(linear_logprob), "triton"])


def logprob(hidden, weight, target, **options):
    return tuple(linear_logprob(hidden, weight, target, **options))


def token_loss(hidden, weight, target, **options):
    result = linear_token_loss(hidden, weight, target, lambda lp, ent, rows: -lp - 0.1 * ent, **options)
    return result.loss, *result.stats


def logits(hidden, weight, target, **options):
    return tuple(logits_logprob(hidden @ weight.t(), target, **options))


OPS = pytest.mark.parametrize("op", [logprob, token_loss, linear_cross_entropy, logits])


def check(op, x, backend, **options):
    spec = partial(op, backend="reference", **options)
    assert_no_worse_than(
        naive=value_and_grads(spec, *x),
        got=value_and_grads(partial(op, backend=backend, **options), *x),
        truth=value_and_grads(spec, *double(x)),
        slack=3e-6,
    )


@OPS
@pytest.mark.parametrize(
    ("backend", "n", "v"),  # interpreted, 151669 tokens take minutes: kernels/test_waist_kernels.py has them on a GPU
    [(name, 3, v) for name in backends(linear_logprob) for v in (50257, 151669)] + [("triton", 1, 50257)],
)
def test_the_vocabularies_of_real_models(backend, n, v, op):
    check(op, linear_logprob_inputs(n, 2, v), backend)


@OPS
@BACKENDS
@pytest.mark.parametrize("v", [1, 127, 128, 129, 255, 256, 257, 509, 513])  # interpreted blocks hold 128 or 256
def test_vocabularies_below_at_and_above_a_block(v, backend, op):
    check(op, linear_logprob_inputs(3, 4, v), backend)


def confident(dtype):
    """hidden, weight, target whose target has p = 1 - 1e-6 among 509 tokens, exactly the same in every dtype."""
    hidden, weight = torch.zeros(2, 1, dtype=dtype), torch.zeros(509, 1, dtype=dtype)
    hidden[:], weight[7] = 4.0, 5.03125  # the logit log(508 x 1e6), to 5e-3
    return hidden, weight, torch.full((2,), 7)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_with_p_of_one_minus_a_millionth_keeps_its_gradient(dtype, backend):
    hidden, weight, target = confident(dtype)
    odds = 508 * math.exp(-4 * 5.03125)  # (1 - p) / p
    miss = odds / (1 + odds)
    assert miss == pytest.approx(1e-6, rel=0.1)
    stats, (d_hidden, d_weight) = value_and_grads(
        lambda h, w: linear_logprob(h, w, target, cache_gib=0.0, backend=backend).logprob.sum(), hidden, weight
    )
    # d logprob / d hidden = (1 - p) 5.03; d logprob / d weight of another token = -p_v 4, of both rows.
    # One f32 sum 1 + 1e-6 holds the 1e-6 to 6 %, which no later step may lose.
    tolerance = {torch.float64: 1e-9, torch.float32: 0.13, torch.bfloat16: 0.13}[dtype]
    assert -stats[0].item() == pytest.approx(2 * odds, rel=tolerance)
    assert d_hidden[0].item() == pytest.approx(5.03125 * miss, rel=tolerance)
    others = torch.arange(509) != 7
    expected = torch.full((508, 1), -8 * miss / 508, dtype=torch.float64)
    torch.testing.assert_close(d_weight[others].double(), expected, rtol=max(1e-9, 1e-2 * tolerance), atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("v", [1, 100, 257])
@pytest.mark.parametrize("level", [-1e4, -30.0])
def test_rows_whose_logits_are_all_negative_see_no_zero_past_the_vocabulary(level, v, backend):
    target = torch.tensor([v - 1])
    stats = logits_logprob(torch.full((1, v), level), target, backend=backend)
    head = linear_logprob(torch.ones(1, 1), torch.full((v, 1), level), target, backend=backend)
    for found in (stats, head):
        assert found.logprob.item() == pytest.approx(-math.log(v), rel=1e-6, abs=1e-6)
        assert found.entropy.item() == pytest.approx(math.log(v), rel=1e-6, abs=1e-6)
        assert found.lse.item() == pytest.approx(level + math.log(v), rel=1e-6)


@OPS
@BACKENDS
@pytest.mark.parametrize("outside", [257, 10**9])
def test_a_target_past_the_vocabulary_is_refused(outside, backend, op):
    hidden, weight, target = linear_logprob_inputs(3, 4, 257)
    with pytest.raises(ValueError, match=f"below the vocabulary of 257, got {outside}"):
        op(hidden, weight, target.index_fill(0, torch.tensor([1]), outside), backend=backend)
    with pytest.raises(ValueError, match="below the vocabulary of 200"):
        op(hidden, weight, torch.full((3,), 200), valid_vocab=200, backend=backend)


@OPS
@BACKENDS
def test_a_batch_of_ignored_targets_has_no_logprob_and_no_gradient_of_it(backend, op):
    hidden, weight, _ = linear_logprob_inputs(3, 4, 100)
    target = torch.tensor([-100, -1, -(10**9)])
    values, _ = value_and_grads(partial(op, target=target, backend=backend), hidden, weight)
    assert all(x.isfinite().all() for x in values)
    which = 1 if op is token_loss else 0
    assert (values[which] == 0).all()


@OPS
@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
def test_a_broken_row_spoils_its_own_numbers_only(backend, op):
    hidden, weight, target = linear_logprob_inputs(5, 4, 100)
    hidden[2, 0] = math.nan
    values, (d_hidden, _) = value_and_grads(partial(op, target=target, backend=backend), hidden, weight)
    sound = torch.arange(5) != 2
    for x in values:
        assert x.dim() == 0 or (x[2].isnan() and x[sound].isfinite().all())
    if op is not linear_cross_entropy:  # its one number is spoiled, the gradients of sound rows are not
        assert d_hidden[sound].isfinite().all()


def sum_over_rows(op, rows):
    """The op as one number that adds up over rows."""

    def total(hidden, weight, target, **options):
        if op is linear_cross_entropy:
            token_weight = torch.linspace(0, 1, 13, dtype=torch.float64)[rows]
            return op(hidden[rows], weight, target[rows], token_weight=token_weight, **options)
        found = op(hidden[rows], weight, target[rows], **options)
        return found[0] if op is token_loss else sum((x * x).sum() for x in found)

    return total


@OPS
@BACKENDS
def test_ranks_that_share_out_the_rows_add_up_to_one(backend, op):
    x = linear_logprob_inputs(13, 4, 100, dtype=torch.float64)
    whole = value_and_grads(partial(sum_over_rows(op, slice(None)), backend=backend), *x)
    cuts = (slice(0, 1), slice(1, 8), slice(8, 8), slice(8, 13))
    parts = [value_and_grads(partial(sum_over_rows(op, rows), chunk_rows=3, backend=backend), *x) for rows in cuts]
    for k, expected in enumerate((*whole.values, *whole.grads)):
        total = sum((*part.values, *part.grads)[k] for part in parts)
        torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-13)


@BACKENDS
@pytest.mark.parametrize("op", [logprob, logits])
def test_a_temperature_that_changes_before_backward_is_noticed(op, backend):
    temperature = torch.ones(3)
    hidden, weight, target = linear_logprob_inputs(3, 4, 20)
    root = op(hidden.requires_grad_(), weight, target, temperature=temperature, backend=backend)[0].sum()
    temperature.mul_(2)
    if backend == "reference":  # keeps a factor of its own
        root.backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        root.backward()
