"""Coefficients to d logits, against float64: every upstream gradient, every place the result may be written to."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.kernels import token_gradient as kernel
from fastrl.kernels.logit_map import map_arguments
from fastrl.kernels.tuning import RowTile
from fastrl.ops.token_stats import RowGrads, row_gradient_, row_stats
from tests.kernels.test_token_stats_kernel import MAPS, logits

TILE = RowTile(128, 4, 1)
UPSTREAM = {
    "logprob": (1, None, None, None),
    "entropy": (None, 1, None, None),
    "lse": (None, None, 1, None),
    "all": (1, 2, 3, 4),
}


def upstream(which, dtype=torch.float32, n=5):
    pattern = torch.tensor([0.5, -1.5, 0.0, 1.0, -0.25], dtype=dtype)[:n]
    return RowGrads(*(None if x is None else x * pattern for x in UPSTREAM[which]))


def written(source, out, target, stats, grads, logit_map=MAPS["identity"], index=None, **kwargs):
    arguments = map_arguments(logit_map.scale, logit_map.softcap, logit_map.temperature, stats.lse.dtype)
    kernel.backward(source, out, index, target, tuple(stats[:3]), grads, arguments, tile=TILE, **kwargs)
    return out


def statistics(raw, target, logit_map=MAPS["identity"]):
    """Of float64, rounded to what a kernel gets."""
    exact = row_stats(raw.double(), target, logit_map)
    return exact, type(exact)(*(None if x is None else x.to(torch.float32) for x in exact))


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("which", UPSTREAM)
@pytest.mark.parametrize("v", [1, 260])
def test_the_gradient_is_that_of_float64_in_place_and_elsewhere(v, which, logit_map):
    raw, target = logits(5, v)
    target[3] = -100
    exact, stats = statistics(raw, target, MAPS[logit_map])
    truth = row_gradient_(raw.double(), target, exact, upstream(which, torch.float64), MAPS[logit_map])
    before = raw.clone()
    elsewhere = written(raw, torch.empty(5, v), target, stats, upstream(which), MAPS[logit_map])
    torch.testing.assert_close(raw, before, rtol=0, atol=0)
    torch.testing.assert_close(elsewhere.double(), truth, rtol=2e-5, atol=3e-6)
    in_place = written(raw, raw, target, stats, upstream(which), MAPS[logit_map])
    torch.testing.assert_close(in_place, elsewhere, rtol=0, atol=0)


@pytest.mark.parametrize("v", [127, 384, 509])
@pytest.mark.parametrize("padded", [False, True])
def test_a_narrower_result_shares_its_row_with_the_logits_it_replaces(padded, v):
    raw, target = logits(5, v)
    if padded:
        wide = torch.full((5, 512), math.nan)
        wide[:, :v] = raw
        raw = wide[:, :v]
    _, stats = statistics(raw, target)
    elsewhere = written(raw, torch.empty(5, v, dtype=torch.bfloat16), target, stats, upstream("all"))
    view = kernel.narrowed(raw, torch.bfloat16)
    assert view.data_ptr() == raw.data_ptr()
    torch.testing.assert_close(written(raw, view, target, stats, upstream("all")), elsewhere, rtol=0, atol=0)


def test_chosen_rows_move_together_into_fresh_memory():
    raw, target = logits(5, 300)
    _, stats = statistics(raw, target)
    whole = written(raw, torch.empty(5, 300), target, stats, upstream("all"))
    index = torch.tensor([0, 3, 4])
    some = written(raw, torch.empty(3, 300), target[index], stats.rows(index), upstream("all").rows(index), index=index)
    torch.testing.assert_close(some, whole[index], rtol=0, atol=0)
    with pytest.raises(AssertionError, match="memory of their own"):
        written(raw, raw[:3], target[index], stats.rows(index), upstream("all").rows(index), index=index)


@pytest.mark.parametrize("top", [3.0, 9.0, 16.0])
def test_the_target_of_a_confident_row_keeps_the_digits_of_one_minus_p(top):
    raw, target = torch.tensor([[0.0, top]]), torch.tensor([1])
    _, stats = statistics(raw, target)
    gradient = written(raw, torch.empty(1, 2), target, stats, RowGrads(torch.ones(1), None, None))
    assert gradient[0, 1].item() == pytest.approx(
        1 / (1 + math.exp(top)), rel=2e-6
    )  # 1 - p of a rounded p would err by 1e-7 / (1 - p)


@pytest.mark.parametrize("which", UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_probabilities_give_the_gradient_of_the_logits(dtype, which):
    raw, target = logits(5, 300)
    logit_map = MAPS["scale and temperature"]
    exact, stats = statistics(raw, target, logit_map)
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2  # the interpreter cuts bf16 off
    kept = torch.empty(5, 300, dtype=dtype)
    arguments = map_arguments(logit_map.scale, None, logit_map.temperature, torch.float32)
    kernel.probability(raw, stats.lse, kept, arguments, tile=TILE)
    torch.testing.assert_close(kept.sum(-1, dtype=torch.float32), torch.ones(5), rtol=0, atol=tolerance)
    before = kept.clone()
    got = written(kept, torch.empty(5, 300), target, stats, upstream(which), logit_map, is_probability=True)
    truth = row_gradient_(raw.double(), target, exact, upstream(which, torch.float64), logit_map)
    torch.testing.assert_close(kept, before, rtol=0, atol=0)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=tolerance)
    column = torch.arange(5), target
    torch.testing.assert_close(got[column].double(), truth[column], rtol=1e-5, atol=3e-6)


def test_forbidden_tokens_and_forbidden_targets_get_finite_numbers():
    raw = torch.full((2, 200), -math.inf)
    raw[:, 7], raw[:, 150] = 1.0, 2.0
    target = torch.tensor([150, 3])
    _, stats = statistics(raw, target)
    gradient = written(raw, torch.empty(2, 200), target, stats, upstream("all", n=2)._replace(mean_logit=None))
    assert gradient.isfinite().all()
    assert (gradient[0, 8:150] == 0).all()
    assert gradient[1, 3] == -1.5  # d logprob of an impossible target pulls with its whole weight
