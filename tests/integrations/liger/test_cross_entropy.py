"""Linear cross entropy under Liger's name against torch's on float64 logits; the scaled one beside it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastrl.integrations.liger import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearScaledCrossEntropyFunction

N, D, V = 9, 6, 13
WEIGHTS = torch.rand(V, generator=torch.Generator().manual_seed(1)) + 0.5


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, V, (N,))
    target[::4] = 3
    return torch.randn(N, D), torch.randn(V, D), torch.randn(V), target


def by_hand(
    z: Tensor, target: Tensor, *, ce_weight: Tensor | None, smoothing: float, scale: float, reduction: str, scaled: bool
) -> Tensor:
    weight = None if ce_weight is None else ce_weight.to(z.dtype)
    loss = cross_entropy(z, target, weight, ignore_index=3, label_smoothing=smoothing, reduction="none")
    is_read = target != 3
    z_loss = (scale * z.logsumexp(-1).square()).where(is_read, 0)
    if reduction == "mean":
        counted = is_read.to(z.dtype) if weight is None else weight[target] * is_read
        loss, z_loss = loss / counted.sum(), z_loss / is_read.sum()
    total = loss + z_loss
    if scaled:
        total = total * z.softmax(-1).gather(-1, target[:, None])[:, 0].detach()
    return total if reduction == "none" else total.sum()


@pytest.mark.parametrize(
    ("ce_weight", "smoothing", "reduction", "scaled", "softcap"),
    [*product((None, WEIGHTS), (0.0, 0.1), ("mean", "sum", "none"), (False, True), (None, 2.0))],
)
def test_every_mix_of_options(
    ce_weight: Tensor | None, smoothing: float, reduction: str, scaled: bool, softcap: float | None
) -> None:
    *leaves, target = inputs()
    leaves = [x.requires_grad_() for x in leaves]
    hidden, weight, bias = leaves
    loss = LigerFusedLinearCrossEntropyLoss(
        ce_weight, 3, 1e-2, smoothing, reduction, softcap, use_token_scaling=scaled
    )(weight, hidden, target, bias)
    assert isinstance(loss, Tensor)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    z = exact[0] @ exact[1].T + exact[2]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = by_hand(
        z, target, ce_weight=ce_weight, smoothing=smoothing, scale=1e-2, reduction=reduction, scaled=scaled
    )
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
    loss.backward(upstream)
    expected.backward(upstream.double())
    for leaf, truth in zip(leaves, exact, strict=True):
        assert truth.grad is not None
        torch.testing.assert_close(leaf.grad, truth.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_is_returned_beside_the_loss(reduction: str) -> None:
    hidden, weight, bias, target = inputs()
    module = LigerFusedLinearCrossEntropyLoss(
        ignore_index=3, lse_square_scale=1e-2, reduction=reduction, return_z_loss=True, return_token_accuracy=True,
        return_predicted_tokens=True,
    )  # fmt: skip
    found: Any = module(weight, hidden, target, bias)
    z, is_read = hidden @ weight.T + bias, target != 3
    predicted = z.argmax(-1).masked_fill(~is_read, -1)
    assert torch.equal(found.predicted_tokens, predicted)
    hits, z_loss = (predicted == target).float(), (1e-2 * z.logsumexp(-1).square()).where(is_read, 0)
    if reduction == "none":
        torch.testing.assert_close((found.token_accuracy, found.z_loss), (hits, z_loss))
        return
    assert found.token_accuracy == hits.sum() / is_read.sum()
    torch.testing.assert_close(found.z_loss, z_loss.sum() / (is_read.sum() if reduction == "mean" else 1))


def test_a_batch_without_a_token_costs_nothing_and_is_no_nan() -> None:
    hidden, weight, bias, target = inputs()
    hidden.requires_grad_()
    for module in (LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)):
        loss: Any = module(weight, hidden, torch.full_like(target, -100), bias)
        loss.backward()
        assert loss == 0
        assert hidden.grad is not None
        assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize("options", [{"label_smoothing": 1.5}, {"reduction": "max"}, {"softcap": -1.0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LigerFusedLinearCrossEntropyLoss(**options)


def test_scaled_cross_entropy_is_nll_and_entropy_at_a_temperature() -> None:
    hidden, weight, _, target = inputs()
    target = target.masked_fill(target == 3, -100)
    apply = LigerFusedLinearScaledCrossEntropyFunction.apply
    found = apply(hidden, weight, target, 0.7, -100, 1, True)
    logp = (hidden @ weight.T / 0.7).log_softmax(-1)
    is_read = target >= 0
    nll = -logp.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(found, (nll.where(is_read, 0), entropy.where(is_read, 0)))
    torch.testing.assert_close(apply(hidden, weight, target, 0.7), found[0])
    for wrong, kind, match in (
        ({"temperature": 0.0}, ValueError, "finite and > 0"),
        ({"temperature": True}, TypeError, "real number"),
        ({"m_tiles_per_cluster": 0}, ValueError, ">= 1"),
        ({"return_entropy": 1}, TypeError, "must be a bool"),
    ):
        with pytest.raises(kind, match=match):
            apply(hidden, weight, target, **wrong)
    with pytest.raises(ValueError, match=r"outside \[0, 13\)"):
        apply(hidden, weight, target + V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights_of_the_heads_dtype_are_summed_in_float32(dtype: torch.dtype, label_smoothing: float) -> None:
    hidden, weight, _, target = (x if x.dtype == torch.int64 else x.to(dtype) for x in inputs())
    class_weight = torch.linspace(0.1, 1.1, len(weight)).to(dtype)
    module = LigerFusedLinearCrossEntropyLoss(class_weight, label_smoothing=label_smoothing)
    logits = hidden.double() @ weight.double().T
    expected = cross_entropy(logits, target, class_weight.double(), label_smoothing=label_smoothing)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(module(weight, hidden, target).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"ce_weight": True, "label_smoothing": 0.1}, {"return_predicted_tokens": True}])
def test_no_rows_cost_nothing(options: dict[str, Any]) -> None:
    hidden, weight, _, target = inputs()
    hidden = hidden[:0].requires_grad_()
    if options.get("ce_weight"):
        options = options | {"ce_weight": torch.ones(len(weight))}
    found: Any = LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, target[:0])
    loss = found if isinstance(found, Tensor) else found.loss
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert isinstance(found, Tensor) or found.predicted_tokens.shape == (0,)
