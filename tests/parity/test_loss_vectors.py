"""Every loss that TRL or Liger has too: their value and gradient, stored in `vectors/losses.npz`, and ours.

float32 to 1e-5 of the gradient's largest entry, float64 to 1e-12 where TRL computes in it throughout; with the head
below the loss wherever Liger fuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrl.losses import (
    bradley_terry,
    centering,
    cispo,
    clipped,
    hinge,
    ipo,
    k3,
    kl_baseline,
    kto,
    orpo,
    sapo,
    sigmoid,
    simpo,
)
from fastrl.ops import linear_cross_entropy, linear_divergence, linear_logprob
from fastrl.recipes.dpo import pair_loss
from fastrl.train.config import DPOConfig
from tests.parity import loss_cases as cases
from tests.parity.setting import VECTORS

BETA = cases.BETA
with np.load(VECTORS / "losses.npz") as _file:
    STORED = dict(_file)
IN_FLOAT32 = ("trl/orpo", "trl/dpo/exo_pair", "trl/smoothed", "liger/")  # somewhere inside, whatever they are given
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Given:
    """The stored tensors in one precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        tensors = {name.removeprefix("given/"): torch.from_numpy(array) for name, array in STORED.items()
                   if name.startswith("given/")}  # fmt: skip
        self.tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def length(self) -> Tensor:
        return self["mask"].sum(1)


def assert_same(name: str, loss: Callable[..., Tensor], *leaves: Tensor, is_shifted: bool = False) -> None:
    """The loss is the stored one, and so are its gradients with respect to the leaves.

    Args:
        is_shifted: the values differ by a constant; gradients alone are compared.
    """
    is_exact = leaves[0].dtype == torch.float64 and not name.startswith(IN_FLOAT32)
    tolerance = 1e-12 if is_exact else 1e-5
    copies = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(*copies)
    assert value.dtype == leaves[0].dtype
    if not is_shifted:
        np.testing.assert_allclose(value.detach(), STORED[f"{name}/loss"], rtol=tolerance)
    for i, gradient in enumerate(torch.autograd.grad(value, copies)):
        expected = STORED[f"{name}/grad{i}"]
        largest = abs(expected).max()
        assert largest > 1e-4, "a gradient of zero would prove nothing"
        np.testing.assert_allclose(gradient, expected, rtol=tolerance, atol=tolerance * largest)


def dpo_loss(name: str, numbers: dict[str, Any], given: Given) -> Callable[[Tensor, Tensor], Tensor]:
    """Log-probability per token of policy and reference -> the mean over pairs, as the recipe compares scores."""
    config = DPOConfig(model_name_or_path="", output_dir="", train_dataset="", beta=BETA, **numbers)

    def loss(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        if name == "sft":
            return -(logprob * given["mask"]).chunk(2)[0].sum() / given.length().chunk(2)[0].sum()
        score = (logprob - ref_logprob).sum(1)
        if name in ("ipo", "sigmoid_norm"):
            score = score / given.length()
        return pair_loss(name, config)(*score.chunk(2)).mean()

    return loss


def completion_logprob(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    """[2P, L, D] hidden states -> [2P, L] log-probability of the completions' tokens, 0 at padding, by the waist."""
    return linear_logprob(hidden.flatten(0, 1), weight, given["target"].flatten()).logprob.view(given["target"].shape)


@DTYPES
@pytest.mark.parametrize("name", cases.DPO)
def test_dpo_losses_are_trls(name: str, dtype: torch.dtype) -> None:
    given = Given(dtype)
    loss = dpo_loss(name, cases.DPO[name], given)
    assert_same(f"trl/dpo/{name}", lambda logprob: loss(logprob, given["ref_logprob"]), given["logprob"])


@DTYPES
@pytest.mark.parametrize("name", [name for name in cases.DPO if name not in cases.LIGER_LACKS])
def test_dpo_losses_over_the_head_are_ligers(name: str, dtype: torch.dtype) -> None:
    given = Given(dtype)
    loss = dpo_loss(name, cases.DPO[name], given)
    reference = completion_logprob(given["ref_hidden"], given["ref_weight"], given)
    assert_same(
        f"liger/dpo/{name}",
        lambda hidden, weight: loss(completion_logprob(hidden, weight, given), reference),
        given["hidden"],
        given["weight"],
    )


@DTYPES
@pytest.mark.parametrize("name", cases.CPO)
def test_cpo_losses_are_trls(name: str, dtype: torch.dtype) -> None:
    given, numbers = Given(dtype), cases.CPO[name]
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sigmoid": partial(sigmoid, beta=BETA, label_smoothing=0.1),
        "hinge": partial(hinge, beta=BETA),
        "ipo": partial(ipo, beta=BETA),
        "simpo": partial(simpo, beta=BETA, gamma=numbers.get("simpo_gamma", 0.0), label_smoothing=0.1),
    }

    def loss(logprob: Tensor) -> Tensor:
        score = logprob.sum(1) / (given.length() if name in ("ipo", "simpo") else 1)
        return losses[name](*score.chunk(2)).mean()

    assert_same(f"trl/cpo/{name}", loss, given["logprob"])


@DTYPES
def test_orpo_is_trls(dtype: torch.dtype) -> None:
    given = Given(dtype)

    def loss(logprob: Tensor) -> Tensor:
        return orpo(*(logprob.sum(1) / given.length()).chunk(2), beta=BETA).mean()

    assert_same("trl/orpo", loss, given["logprob"])


@DTYPES
@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_losses_without_a_reference_over_the_head_are_ligers(name: str, dtype: torch.dtype) -> None:
    given = Given(dtype)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = completion_logprob(hidden, weight, given)
        chosen, rejected = logprob.sum(1).chunk(2)
        nll = -chosen.sum() / given.length().chunk(2)[0].sum()
        if name == "cpo":
            return sigmoid(chosen, rejected, beta=BETA, label_smoothing=0.1).mean() + 0.7 * nll
        means = (logprob.sum(1) / given.length()).chunk(2)
        if name == "simpo":
            return simpo(*means, beta=BETA, gamma=0.6, label_smoothing=0.1).mean()
        return orpo(*means, beta=BETA).mean() + nll

    assert_same(f"liger/{name}", loss, given["hidden"], given["weight"])


def kto_loss(given: Given, logprob: Tensor, ref_logprob: Tensor, baseline: Tensor, **numbers: float) -> Tensor:
    log_ratio = (logprob - ref_logprob).sum(1)
    return kto(log_ratio, given["label"], baseline, beta=BETA, **numbers).mean()


@DTYPES
@pytest.mark.parametrize("name", cases.KTO)
def test_kto_is_trls(name: str, dtype: torch.dtype) -> None:
    given = Given(dtype)
    baseline = kl_baseline(given["kl_logprob"] - given["ref_kl_logprob"])
    assert baseline > 0.1
    if name == "apo_zero_unpaired":
        baseline = torch.zeros(())

    def loss(logprob: Tensor) -> Tensor:
        return kto_loss(given, logprob, given["ref_logprob"], baseline, **cases.KTO[name])

    assert_same(f"trl/kto/{name}", loss, given["logprob"])


@DTYPES
def test_kto_over_the_head_is_ligers(dtype: torch.dtype) -> None:
    given = Given(dtype)
    baseline = kl_baseline(given["kl_logprob"] - given["ref_kl_logprob"])
    reference = completion_logprob(given["ref_hidden"], given["ref_weight"], given)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return kto_loss(given, completion_logprob(hidden, weight, given), reference, baseline)

    assert_same("liger/kto", loss, given["hidden"], given["weight"])


@DTYPES
@pytest.mark.parametrize("name", cases.REWARD)
def test_reward_model_losses_are_trls(name: str, dtype: torch.dtype) -> None:
    given, case = Given(dtype), cases.REWARD[name]

    def loss(score: Tensor) -> Tensor:
        pair = score.chunk(2)
        value = bradley_terry(*pair, margin=given["margin"] if case["margin"] else None)
        return (value + (case["center"] or 0.0) * centering(*pair)).mean()

    assert_same(f"trl/reward/{name}", loss, given["score"])


@DTYPES
@pytest.mark.parametrize("name", cases.DIVERGENCE)
@pytest.mark.parametrize("peer", ["trl/gkd", "liger/jsd"])
def test_divergences_between_two_heads_are_theirs(peer: str, name: str, dtype: torch.dtype) -> None:
    given, (beta, temperature) = Given(dtype), cases.DIVERGENCE[name]
    target = given["target"].flatten()
    alpha = cases.HARD_SHARE if peer == "liger/jsd" and temperature == 1 else 0.0

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        result = linear_divergence(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            given["teacher_hidden"].flatten(0, 1),
            given["teacher_weight"],
            beta=beta,
            temperature=temperature,
            target=target,
            alpha=alpha,
            row_weight=(target >= 0).to(dtype) / (target >= 0).sum(),
        )
        return result.loss

    hidden = given["hidden"] if peer == "trl/gkd" else given["hidden"].flatten(0, 1)
    assert_same(f"{peer}/{name}", loss, hidden, given["weight"])


@DTYPES
def test_label_smoothing_is_that_of_trls_sft_trainer(dtype: torch.dtype) -> None:
    given = Given(dtype)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        target = given["target"].flatten()
        return linear_cross_entropy(hidden.flatten(0, 1), weight, target, label_smoothing=cases.SMOOTHING)

    assert_same("trl/smoothed", loss, given["hidden"], given["weight"])


@DTYPES
@pytest.mark.parametrize("name", cases.POLICY_LOSSES)
def test_policy_losses_are_ligers(name: str, dtype: torch.dtype) -> None:
    given, numbers = Given(dtype), cases.POLICY
    advantage = given["advantage"][:, None].expand_as(given["logprob"])

    def loss(logprob: Tensor) -> Tensor:
        log_ratio = logprob - given["old_logprob"]
        if name == "sapo":  # a mean over sequences of means over tokens
            return (sapo(log_ratio, advantage) * given["mask"] / given.length()[:, None]).sum() / len(logprob)
        if name == "cispo":
            token = cispo(log_ratio, advantage, high=numbers["cap"])
        else:
            token = clipped(log_ratio, advantage, low=numbers["low"], high=numbers["high"], delta=numbers["delta"])
            token = token + numbers["kl"] * k3(logprob, given["ref_logprob"])
        return (token * given["mask"]).sum() / given["mask"].sum()

    assert_same(f"liger/policy/{name}", loss, given["logprob"], is_shifted=name == "cispo")


def test_every_stored_number_is_compared() -> None:
    names = {name.rsplit("/", 1)[0] for name in STORED if name.endswith("/loss")}
    compared = {f"trl/dpo/{name}" for name in cases.DPO} | {f"trl/cpo/{name}" for name in cases.CPO}
    compared |= {f"liger/dpo/{name}" for name in cases.DPO if name not in cases.LIGER_LACKS}
    compared |= {f"trl/kto/{name}" for name in cases.KTO} | {f"trl/reward/{name}" for name in cases.REWARD}
    compared |= {f"{peer}/{name}" for peer in ("trl/gkd", "liger/jsd") for name in cases.DIVERGENCE}
    compared |= {f"liger/policy/{name}" for name in cases.POLICY_LOSSES}
    compared |= {"trl/orpo", "trl/smoothed", "liger/cpo", "liger/simpo", "liger/orpo", "liger/kto"}
    assert names == compared
