"""Our modules under Liger's names against what Liger 0.8.5 computed from stored tensors: value and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrl.integrations import liger
from tests.parity import loss_cases as cases
from tests.parity.setting import VECTORS

with np.load(VECTORS / "losses.npz") as stored:
    ALL = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "made_by"}
GIVEN = {name.removeprefix("given/"): x for name, x in ALL.items() if name.startswith("given/")}


def assert_as_stored(name: str, loss_of: Any, *leaves: Tensor) -> None:
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    loss = loss_of(*leaves)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ALL[f"{name}/loss"], rtol=1e-5, atol=1e-5)
    for i, leaf in enumerate(leaves):
        torch.testing.assert_close(leaf.grad, ALL[f"{name}/grad{i}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", [name for name in cases.DPO if name not in cases.LIGER_LACKS])
def test_dpo(loss_type: str) -> None:
    dpo = liger.LigerFusedLinearDPOLoss(beta=cases.BETA, loss_type=loss_type, **cases.DPO[loss_type])

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = dpo(weight, hidden, GIVEN["target"], None, GIVEN["ref_hidden"], GIVEN["ref_weight"])[0]
        return value

    assert_as_stored(f"liger/dpo/{loss_type}", loss, GIVEN["hidden"], GIVEN["weight"])


ALONE = {
    "cpo": liger.LigerFusedLinearCPOLoss(beta=cases.BETA, alpha=0.7, label_smoothing=0.1),
    "simpo": liger.LigerFusedLinearSimPOLoss(beta=cases.BETA, gamma=0.6, label_smoothing=0.1, compute_nll_loss=False),
    "orpo": liger.LigerFusedLinearORPOLoss(beta=cases.BETA),
}


@pytest.mark.parametrize("name", ALONE)
def test_pairs_without_a_reference(name: str) -> None:
    assert_as_stored(
        f"liger/{name}", lambda h, w: ALONE[name](w, h, GIVEN["target"])[0], GIVEN["hidden"], GIVEN["weight"]
    )


def test_kto() -> None:
    kto = liger.LigerFusedLinearKTOLoss(beta=cases.BETA, use_ref_model=True)
    kl = (GIVEN["kl_logprob"] - GIVEN["ref_kl_logprob"]).mean().clamp(min=0)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"ref_input": GIVEN["ref_hidden"], "ref_weight": GIVEN["ref_weight"], "kl": kl}
        value: Tensor = kto(hidden, weight, GIVEN["target"], preference_labels=GIVEN["label"], **options)[0]
        return value

    assert_as_stored("liger/kto", loss, GIVEN["hidden"], GIVEN["weight"])


@pytest.mark.parametrize("name", cases.DIVERGENCE)
def test_jsd(name: str) -> None:
    beta, temperature = cases.DIVERGENCE[name]
    hard = cases.HARD_SHARE if temperature == 1 else 0.0
    jsd = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=1 - hard, beta=beta, temperature=temperature
    )
    teacher = (GIVEN["teacher_hidden"].flatten(0, 1), GIVEN["teacher_weight"])
    rows = GIVEN["hidden"].flatten(0, 1)
    target = GIVEN["target"].flatten()
    assert_as_stored(f"liger/jsd/{name}", lambda h, w: jsd(h, w, *teacher, target), rows, GIVEN["weight"])


@pytest.mark.parametrize(("name", "loss_type"), list(zip(cases.POLICY_LOSSES, ("bnpo", "sapo", "cispo"), strict=True)))
def test_policy_losses_over_logits(name: str, loss_type: str) -> None:
    """The stored log-probabilities as logits: of two tokens, one with that probability and one with the rest."""
    numbers, is_clipped = cases.POLICY, name == "clipped"

    def loss(logprob: Tensor) -> Tensor:
        logits = torch.stack([logprob, torch.log(-torch.expm1(logprob))], dim=-1)
        logits = torch.cat([logits, logits[:, :1]], dim=1)  # the last one is not read
        value: Tensor = liger.triton_grpo_loss(
            logits,
            GIVEN["old_logprob"],
            GIVEN["ref_logprob"],
            torch.zeros_like(GIVEN["target"]),
            GIVEN["advantage"],
            GIVEN["mask"].float(),
            temperature=1.0,
            beta=numbers["kl"] if is_clipped else 0.0,
            eps_low=numbers["low"],
            eps_high=numbers["cap" if loss_type == "cispo" else "high"],
            delta=numbers["delta"] if is_clipped else None,
            loss_type=loss_type,
            reduce=True,
        )[0]
        return value

    logprob = GIVEN["logprob"].where(GIVEN["mask"], -1.0)
    expected = ALL[f"liger/policy/{name}/grad0"]
    leaf = logprob.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    torch.testing.assert_close(value.detach(), ALL[f"liger/policy/{name}/loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)
