"""What Liger's names are given by mistake: one sentence, where arithmetic on wrong rows would give a number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fastrl.integrations import liger

B, T, D, V = 4, 6, 5, 23
PAIRS = (
    partial(liger.LigerFusedLinearDPOLoss, use_ref_model=False),
    liger.LigerFusedLinearCPOLoss,
    liger.LigerFusedLinearSimPOLoss,
    liger.LigerFusedLinearORPOLoss,
)
torch.manual_seed(0)
HIDDEN, WEIGHT, IDS = torch.randn(B, T, D), torch.randn(V, D), torch.randint(0, V, (B, T))
NEGATIVE = IDS.clone()
NEGATIVE[0, 1] = -1
MASK, ADVANTAGES = torch.ones(B, T), torch.tensor([1.0, -1.0, 0.5, 2.0])
LABELS = torch.tensor([True, False, True, False])
LONGER = torch.randn(B, T + 1, D)


def grpo(level: str = "token", **tensors: Any) -> Any:
    loss = liger.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, importance_sampling_level=level)
    given = {"_input": HIDDEN, "selected_token_ids": IDS, "attention_mask": MASK, "advantages": ADVANTAGES} | tensors
    return loss(lin_weight=WEIGHT, **given)[0]


def grpo_on_logits(**tensors: Any) -> Any:
    given = {"logits": LONGER @ WEIGHT.t(), "completion_ids": IDS, "advantages": ADVANTAGES} | tensors
    return liger.triton_grpo_loss(**{"old_logp": None, "ref_logp": None, "beta": 0.0, **given})[0]


@pytest.mark.parametrize("make", PAIRS)
def test_half_a_pair_is_refused(make: Callable[[], Any]) -> None:
    for sequences in (1, 3):
        with pytest.raises(ValueError, match=rf"as many chosen sequences as rejected ones after them, got {sequences}"):
            make()(WEIGHT, HIDDEN[:sequences], IDS[:sequences])


@pytest.mark.parametrize("make", PAIRS)
def test_hidden_states_that_are_not_the_targets_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"28 hidden states for 24 tokens of shape \(4, 6\)"):
        make()(WEIGHT, LONGER, IDS)


def test_a_reference_of_other_length_is_refused() -> None:
    with pytest.raises(ValueError, match="28 hidden states for 24 tokens"):
        liger.LigerFusedLinearDPOLoss()(WEIGHT, HIDDEN, IDS, ref_input=LONGER, ref_weight=WEIGHT)
    loss = liger.LigerFusedLinearGRPOLoss()
    with pytest.raises(ValueError, match="28 hidden states for 24 tokens"):
        loss(HIDDEN, WEIGHT, IDS, MASK, ADVANTAGES, ref_input=LONGER, ref_weight=WEIGHT)
    with pytest.raises(ValueError, match="28 hidden states for 24 tokens"):
        grpo("sequence", _input=LONGER)


@pytest.mark.parametrize("make", PAIRS)
def test_a_negative_id_that_is_not_the_ignored_one_is_refused_by_pairs(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="target holds -1"):
        make()(WEIGHT, HIDDEN, NEGATIVE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: liger.LigerFusedLinearKTOLoss()(HIDDEN, WEIGHT, NEGATIVE, preference_labels=LABELS),
        lambda: liger.LigerFusedLinearJSDLoss()(HIDDEN, WEIGHT, HIDDEN, WEIGHT, NEGATIVE),
        lambda: liger.LigerFusedLinearCrossEntropyLoss()(WEIGHT, HIDDEN.flatten(0, 1), NEGATIVE.flatten()),
        lambda: grpo(selected_token_ids=NEGATIVE),
        lambda: grpo("sequence", selected_token_ids=NEGATIVE),
        lambda: grpo_on_logits(completion_ids=NEGATIVE),
    ],
)
def test_a_negative_id_that_is_not_the_ignored_one_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="target holds -1"):
        call()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_negative_id_under_the_mask_is_padding(level: str) -> None:
    assert torch.equal(
        grpo(level, selected_token_ids=NEGATIVE, attention_mask=MASK.where(NEGATIVE >= 0, 0)),
        grpo(level, attention_mask=MASK.where(NEGATIVE >= 0, 0)),
    )


def test_other_targets_of_the_nll_have_the_targets_shape() -> None:
    with pytest.raises(ValueError, match=r"nll_target must have target's shape \(4, 6\), got \(4, 5\)"):
        liger.LigerFusedLinearORPOLoss()(WEIGHT, HIDDEN, IDS, nll_target=IDS[:, 1:])


@pytest.mark.parametrize("call", [grpo, grpo_on_logits])
def test_numbers_that_would_be_stretched_over_other_tokens_are_refused(call: Callable[..., Any]) -> None:
    for advantages in (ADVANTAGES[:1], ADVANTAGES[:, None]):
        with pytest.raises(ValueError, match=r"advantages must be \[4\]"):
            call(advantages=advantages)
    old = "old_per_token_logps" if call is grpo else "old_logp"
    with pytest.raises(ValueError, match=r"old log-probabilities must be \[4, 6\], got shape \(4, 1\)"):
        call(**{old: torch.zeros(B, 1)})


def test_masks_and_logits_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must have the tokens' shape \(4, 6\), got \(4, 1\)"):
        grpo(attention_mask=MASK[:, :1])
    with pytest.raises(ValueError, match=r"logits must be \[4, 7, V\]"):
        grpo_on_logits(logits=HIDDEN @ WEIGHT.t())
    with pytest.raises(ValueError, match=r"a mask like the ids, got \(4, 7, 23\) and \(4, 1\)"):
        grpo_on_logits(completion_mask=MASK[:, :1])


def test_old_log_probabilities_are_constants() -> None:
    old = torch.zeros(B, T, requires_grad=True)
    assert not grpo_on_logits(old_logp=old).requires_grad


def test_labels_and_class_weights_of_other_shapes_are_refused() -> None:
    for labels in (LABELS[:1], LABELS[:, None]):
        with pytest.raises(ValueError, match=r"preference_labels must be \[4\]"):
            liger.LigerFusedLinearKTOLoss()(HIDDEN, WEIGHT, IDS, preference_labels=labels)
    loss = liger.LigerFusedLinearCrossEntropyLoss(ce_weight=torch.ones(V + 1))
    with pytest.raises(ValueError, match=r"ce_weight must be \[23\], got shape \(24,\)"):
        loss(WEIGHT, HIDDEN.flatten(0, 1), IDS.flatten())


def test_a_reference_given_twice_is_told_of() -> None:
    hidden, weight, ids = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    loss, known = liger.LigerFusedLinearGRPOLoss(), torch.full((2, 3), -1.0)
    arguments = (hidden, weight, ids, torch.ones(2, 3), torch.ones(2), None, known)
    with pytest.warns(UserWarning, match="ref_input is not used"):
        twice = loss(*arguments, ref_input=hidden, ref_weight=weight)[0]
    assert twice == loss(*arguments)[0]
