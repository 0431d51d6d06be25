"""GRPO over a head and over logits, under Liger's names, against formulas on float64 logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.integrations.liger import LigerFusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss

B, T, D, V = 3, 6, 5, 23
PER_TOKEN = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).float()
    return {
        "hidden": torch.randn(B, T, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "ids": torch.randint(0, V, (B, T)),
        "mask": mask,
        "advantage": torch.tensor([1.0, -0.7, 0.4]),
        "old": -3 + 0.5 * torch.randn(B, T),
        "ref": -3 + 0.5 * torch.randn(B, T),
        "correction": torch.rand(B, T) + 0.5,
    }


def by_hand(given: dict[str, Tensor], logp: Tensor, *, loss_type: str, level: str, beta: float) -> Tensor:
    """Low 0.2, high 0.3 (cispo: cap 1.5), temperature 0.8 already applied."""
    log_ratio, advantage, mask = logp - given["old"], given["advantage"][:, None], given["mask"]
    length = mask.sum(1, keepdim=True)
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1, keepdim=True) / length).expand_as(logp)
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=1.5).detach() * advantage * logp
    elif loss_type == "sapo":
        tau = torch.where(advantage > 0, 1.0, 1.05)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    elif loss_type == "vespo":
        w = ((logp - given["old"]) * mask).sum(1, keepdim=True) + given["correction"].log().sum(1, keepdim=True)
        w = w.clamp(-18.420680743952367, 20).detach()
        k, decay = torch.where(advantage >= 0, 2.0, 3.0), torch.where(advantage >= 0, 3.0, 2.0)
        loss = -(decay + k * w - decay * w.exp()).exp() * advantage * logp
    else:
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
    if loss_type != "vespo":
        loss = loss * given["correction"]
    gap = given["ref"] - logp
    loss = loss + beta * (gap.exp() - gap - 1)
    if loss_type in ("grpo", "sapo"):
        return ((loss * mask).sum(1) / length[:, 0]).mean()
    if loss_type == "luspo":
        return (loss * length).mean()
    return (loss * mask).sum() / (B * 9 if loss_type == "dr_grpo" else mask.sum())


def options(loss_type: str) -> dict[str, Any]:
    return {"max_completion_length": 9, "loss_type": loss_type}


CASES = [(name, "token") for name in PER_TOKEN] + [("dapo", "sequence"), ("luspo", "sequence")]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_loss_and_gradients_over_a_head(loss_type: str, level: str, beta: float) -> None:
    given = inputs()
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    module = LigerFusedLinearGRPOLoss(
        beta=beta, temperature=0.8, epsilon_low=0.2, epsilon_high=1.5 if loss_type == "cispo" else 0.3,
        importance_sampling_level=level, **options(loss_type),
    )  # fmt: skip
    hidden, weight, bias = leaves
    loss, metrics = module(
        hidden, weight, given["ids"], given["mask"], given["advantage"], bias, given["ref"], given["old"],
        vllm_is_ratio=given["correction"],
    )  # fmt: skip
    loss.backward()

    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = (exact[0] @ exact[1].T + exact[2]) / 0.8
    logp = logits.log_softmax(-1).gather(-1, given["ids"][..., None])[..., 0]
    expected = by_hand(given, logp, loss_type=loss_type, level=level, beta=beta)
    expected.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    for leaf, truth in zip(leaves, exact, strict=True):
        assert truth.grad is not None
        torch.testing.assert_close(leaf.grad, truth.grad.float(), rtol=1e-4, atol=1e-5)
    assert len(metrics) == (2 if beta else 1)
    gap = given["ref"] - logp
    if beta:
        kl = ((gap.exp() - gap - 1) * given["mask"]).sum() / given["mask"].sum()
        torch.testing.assert_close(metrics[0], kl.detach().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_over_logits_the_numbers_are_those_over_the_head(loss_type: str, level: str) -> None:
    given = inputs()
    cap = 1.5 if loss_type == "cispo" else 0.3
    module = LigerFusedLinearGRPOLoss(
        beta=0.1, temperature=0.8, epsilon_high=cap, importance_sampling_level=level, **options(loss_type)
    )
    arguments = (given["ids"], given["mask"], given["advantage"])
    correction = given["correction"]
    masked = given["mask"] == 0
    expected, metrics = module(
        given["hidden"], given["weight"], *arguments, given["bias"], given["ref"], given["old"],
        vllm_is_ratio=correction,
    )  # fmt: skip
    logits = given["hidden"] @ given["weight"].T + given["bias"]
    logits = torch.cat([logits, torch.zeros(B, 1, V)], dim=1).requires_grad_()
    loss, of_logits = triton_grpo_loss(
        logits, given["old"], given["ref"], given["ids"], given["advantage"], given["mask"], 0.8, 0.1, 0.2, cap,
        vllm_is_ratio=correction, importance_sampling_level=level, reduce=True, **options(loss_type),
    )  # fmt: skip
    if loss_type == "luspo":  # over a head Liger counts masked places in, over logits they are 0
        assert loss != expected
    else:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuple(of_logits), metrics, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[:, -1].abs().max() == 0
    assert logits.grad[:, :-1][masked].abs().max() == 0


def test_without_an_old_policy_the_ratio_is_one_and_nothing_is_clipped() -> None:
    given = inputs()
    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    loss, (clipped,) = module(given["hidden"], given["weight"], given["ids"], given["mask"], given["advantage"])
    torch.testing.assert_close(loss, torch.tensor(-(4 * 1.0 - 6 * 0.7 + 0.4) / 11))
    assert clipped == 0


def test_num_items_in_batch_is_the_normaliser() -> None:
    given = inputs()
    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    loss, _ = module(
        given["hidden"], given["weight"], given["ids"], given["mask"], given["advantage"], num_items_in_batch=22
    )
    torch.testing.assert_close(loss, torch.tensor(-(4 * 1.0 - 6 * 0.7 + 0.4) / 22))


def test_the_reference_may_come_as_hidden_states() -> None:
    given = inputs()
    module, ref_weight = LigerFusedLinearGRPOLoss(beta=0.3, temperature=0.8), given["weight"] + 0.1
    arguments = (given["hidden"], given["weight"], given["ids"], given["mask"], given["advantage"], None)
    logits = given["hidden"] @ ref_weight.T / 0.8
    logps = logits.log_softmax(-1).gather(-1, given["ids"][..., None])[..., 0]
    from_hidden = module(*arguments, ref_input=given["hidden"], ref_weight=ref_weight)
    torch.testing.assert_close(from_hidden, module(*arguments, logps))
    with pytest.raises(ValueError, match="use_ref_model needs"):
        module(*arguments)


def test_selected_log_probabilities_are_zero_where_masked() -> None:
    given = inputs()
    logits = torch.randn(B, T + 1, V)
    ids = torch.cat([torch.zeros(B, 4, dtype=torch.long), given["ids"]], dim=1)
    found = fused_selective_log_softmax(logits, ids, 0.7, torch.cat([torch.zeros(B, 4), given["mask"]], dim=1))
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, given["ids"][..., None])[..., 0]
    torch.testing.assert_close(found, expected * given["mask"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "ppo"}, "Unknown loss_type"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"loss_type": "cispo", "delta": 2.0}, "not supported for loss_type='cispo'"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "Sequence-level"),
        ({"importance_sampling_level": "turn"}, "must be 'token' or 'sequence'"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], match: str) -> None:
    given = inputs()
    module = LigerFusedLinearGRPOLoss(beta=0.0, **options)
    with pytest.raises(ValueError, match=match):
        module(given["hidden"], given["weight"], given["ids"], given["mask"], given["advantage"])
    with pytest.raises(ValueError, match="sapo_temperature_pos"):
        LigerFusedLinearGRPOLoss(sapo_temperature_pos=0.0)


def test_a_correction_of_another_shape_is_refused() -> None:
    given = inputs()
    module = LigerFusedLinearGRPOLoss(beta=0.0)
    with pytest.raises(ValueError, match="vllm_is_ratio must be"):
        module(given["hidden"], given["weight"], given["ids"], given["mask"], given["advantage"],
               vllm_is_ratio=torch.ones(B, 2))  # fmt: skip
