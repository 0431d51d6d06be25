"""Every preference loss against the NumPy oracle, value and gradient, and what each of them is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrl.losses import preference, ranked, reference_free, unpaired
from tests import oracle_preference as oracle

# Scores of pairs: right and wrong order, equal, far apart, and one of them 0.
PAIRS = [(0.3, -0.2), (-1.5, 2.0), (0.0, 0.0), (4.0, -7.0), (-30.0, 11.0), (0.7, 0.0), (-2.25, -2.0)]
AVERAGES = [(-0.3, -1.2), (-2.5, -0.1), (-0.69, -0.7), (-1e-3, -4.0), (-9.0, -0.02), (-3.0, -3.0)]

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., oracle.Triple], dict[str, float]]] = {
    "sigmoid": (preference.sigmoid, oracle.sigmoid, {"beta": 0.1}),
    "cdpo": (partial(preference.sigmoid, label_smoothing=0.2), partial(oracle.sigmoid, e=0.2), {"beta": 0.5}),
    "robust": (partial(preference.robust, label_smoothing=0.2), partial(oracle.robust, e=0.2), {"beta": 0.5}),
    "hinge": (preference.hinge, oracle.hinge, {"beta": 0.4}),
    "ipo": (preference.ipo, oracle.ipo, {"beta": 0.25}),
    "exo_pair": (partial(preference.exo_pair, label_smoothing=1e-3), partial(oracle.exo_pair, e=1e-3), {"beta": 0.3}),
    "nca_pair": (preference.nca_pair, oracle.nca_pair, {"beta": 0.1}),
    "bco_pair": (preference.bco_pair, oracle.bco_pair, {"beta": 0.1}),
    "sppo_hard": (preference.sppo_hard, oracle.sppo_hard, {"beta": 0.1}),
    "apo_zero": (preference.apo_zero, oracle.apo_zero, {"beta": 0.3}),
    "apo_down": (preference.apo_down, oracle.apo_down, {"beta": 0.3}),
    "discopop": (preference.discopop, oracle.discopop, {"beta": 0.05}),
    "simpo": (reference_free.simpo, oracle.simpo, {"beta": 2.0, "gamma": 0.5}),
    "smoothed simpo": (
        partial(reference_free.simpo, label_smoothing=0.1),
        partial(oracle.simpo, e=0.1),
        {"beta": 2.5, "gamma": 1.4},
    ),
    "orpo": (reference_free.orpo, oracle.orpo, {"beta": 0.1}),
}


def tensors(pairs: list[tuple[float, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(column, dtype=dtype, requires_grad=True) for column in zip(*pairs, strict=True)]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-7}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_of_a_pair_are_the_papers(name: str, dtype: torch.dtype) -> None:
    ours, theirs, options = CASES[name]
    pairs = AVERAGES if name.endswith(("simpo", "orpo")) else PAIRS
    chosen, rejected = tensors(pairs, dtype)
    value = ours(chosen, rejected, **options)
    slopes = torch.autograd.grad(value.sum(), (chosen, rejected))
    # The oracle reads the numbers as float32 rounded them: the formula is tested, not the input's rounding.
    read = zip(chosen.tolist(), rejected.tolist(), strict=True)
    truth = torch.tensor([theirs(c, r, **options) for c, r in read], dtype=torch.float64)
    assert value.shape == chosen.shape
    assert value.dtype == dtype
    for got, expected in zip((value.detach(), *slopes), truth.unbind(1), strict=True):
        torch.testing.assert_close(got.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kto_is_the_papers_on_both_sides_of_the_baseline(dtype: torch.dtype) -> None:
    points = [(0.4, True), (-3.0, True), (2.0, False), (-1.0, False), (25.0, True), (25.0, False)]
    log_ratio = torch.tensor([x for x, _ in points], dtype=dtype, requires_grad=True)
    label = torch.tensor([is_desirable for _, is_desirable in points])
    baseline = torch.tensor(0.625, dtype=dtype, requires_grad=True)
    value = unpaired.kto(log_ratio, label, baseline, beta=0.3, desirable_weight=1.5, undesirable_weight=0.75)
    slope, of_baseline = torch.autograd.grad(value.sum(), (log_ratio, baseline), allow_unused=True)
    read = zip(log_ratio.tolist(), label.tolist(), strict=True)
    truth = torch.tensor([oracle.kto(x, y, 0.625, 0.3, 1.5, 0.75) for x, y in read], dtype=torch.float64)
    torch.testing.assert_close(value.detach().double(), truth[:, 0], **tolerance(dtype))
    torch.testing.assert_close(slope.double(), truth[:, 1], **tolerance(dtype))
    assert of_baseline is None


def test_the_kl_baseline_is_a_constant_mean_that_is_never_negative() -> None:
    log_ratio = torch.tensor([1.0, -0.25, 0.75], requires_grad=True)
    baseline = unpaired.kl_baseline(log_ratio)
    assert baseline.item() == 0.5
    assert not baseline.requires_grad
    assert unpaired.kl_baseline(-log_ratio).item() == 0
    assert unpaired.kl_baseline(log_ratio[:0]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rrhf_compares_completions_of_one_prompt_alone(dtype: torch.dtype) -> None:
    logprob = torch.tensor([-1.0, -0.5, -2.0, -0.25, -3.0, -0.125], dtype=dtype, requires_grad=True)
    score = torch.tensor([3.0, 1.0, 1.0, 0.0, 9.0, 2.0])
    group = torch.tensor([7, 7, 7, 7, 4, 4])
    value = ranked.rrhf(logprob, score, group)
    (slope,) = torch.autograd.grad(value.sum(), logprob)
    truth, slopes = oracle.rrhf(logprob.tolist(), score.tolist(), group.tolist())
    np.testing.assert_allclose(value.detach().numpy(), truth, rtol=1e-6)
    np.testing.assert_array_equal(slope.numpy(), slopes)
    assert value.tolist() == [0.5 + 0.75, 0.25, 1.75, 0.0, 2.875, 0.0]


def test_the_best_of_a_group_is_the_first_of_its_highest_scores() -> None:
    score = torch.tensor([1.0, 2.0, 2.0, -1.0, -5.0])
    assert ranked.is_best(score, torch.tensor([0, 0, 0, 3, 3])).tolist() == [False, True, False, True, False]


def test_an_undecided_policy_pays_log_two_and_an_ipo_target_is_met_exactly() -> None:
    one = torch.tensor([1.25])
    assert preference.sigmoid(one, one, beta=0.1).item() == pytest.approx(math.log(2))
    assert preference.ipo(one, one - 5.0, beta=0.1).item() == 0
    assert preference.sppo_hard(torch.tensor([5.0]), torch.tensor([-5.0]), beta=0.1).item() == 0
    assert reference_free.simpo(one, one - 0.25, beta=2.0, gamma=0.5).item() == pytest.approx(math.log(2))


def test_the_robust_loss_is_unbiased_under_flipped_labels() -> None:
    chosen, rejected = tensors(PAIRS, torch.float64)
    e = 0.3
    right = preference.robust(chosen, rejected, beta=0.1, label_smoothing=e)
    flipped = preference.robust(rejected, chosen, beta=0.1, label_smoothing=e)
    clean = preference.sigmoid(chosen, rejected, beta=0.1)
    torch.testing.assert_close((1 - e) * right + e * flipped, clean)


def test_certain_and_impossible_sequences_have_finite_odds() -> None:
    chosen = torch.tensor([0.0, -1e-9, -200.0, -1e-30], requires_grad=True)
    rejected = torch.tensor([-200.0, 0.0, -1e-9, 0.0], requires_grad=True)
    value = reference_free.orpo(chosen, rejected, beta=0.1)
    slopes = torch.autograd.grad(value.sum(), (chosen, rejected))
    assert value.isfinite().all()
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize(
    ("loss", "label_smoothing"), [(preference.robust, 0.5), (preference.exo_pair, 0.0), (preference.exo_pair, 1.0)]
)
def test_a_label_smoothing_without_meaning_is_refused(loss: Any, label_smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        loss(torch.zeros(1), torch.zeros(1), beta=0.1, label_smoothing=label_smoothing)
