from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.losses.weighting import fixed_length, prompt_mean, sequence_mean, sequence_sum, token_mean, without
from tests import oracle

RULES = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "fixed_length": partial(fixed_length, length=16),
    "prompt_mean": prompt_mean,
}
STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=8)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(step=STEPS)
def test_weights_are_the_definitions(rule: str, step: list[tuple[int, int]]) -> None:
    length, group = [n for n, _ in step], [g for _, g in step]
    got = RULES[rule](torch.tensor(length), torch.tensor(group))
    assert got.dtype == torch.float32
    if sum(length) == 0:
        assert not got.any()
        return
    assert got.tolist() == pytest.approx(oracle.weights(rule, length, group, 16), rel=1e-7)


def test_three_sequences_of_two_prompts() -> None:
    length, group = torch.tensor([1, 3, 4]), torch.tensor([0, 0, 1])
    assert token_mean(length, group).tolist() == pytest.approx([1 / 8] * 3)
    assert sequence_mean(length, group).tolist() == pytest.approx([1 / 3, 1 / 9, 1 / 12])
    assert sequence_sum(length, group).tolist() == pytest.approx([1 / 3] * 3)
    assert fixed_length(length, group, length=10).tolist() == pytest.approx([1 / 30] * 3)
    assert prompt_mean(length, group).tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 8])


@pytest.mark.parametrize("rule", ["token_mean", "sequence_mean", "prompt_mean"])
def test_means_add_up_to_one(rule: str) -> None:
    length, group = torch.tensor([5, 0, 2, 11]), torch.tensor([1, 1, 2, 2])
    assert (RULES[rule](length, group) * length).sum().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_masked_sequence_either_keeps_the_denominator_or_leaves_it(rule: str) -> None:
    length, group, kept = torch.tensor([2, 6, 4]), torch.tensor([0, 0, 1]), torch.tensor([True, False, True])
    kept_denominator = without(RULES[rule], length, group, kept, keep_denominator=True)
    left_denominator = without(RULES[rule], length, group, kept, keep_denominator=False)
    alone = RULES[rule](length[kept], group[kept])
    assert kept_denominator[1] == left_denominator[1] == 0
    assert torch.equal(kept_denominator[kept], RULES[rule](length, group)[kept])
    assert torch.equal(left_denominator[kept], alone)


def test_masking_the_longest_of_three_by_hand() -> None:
    length, group, kept = torch.tensor([2, 6, 2]), torch.zeros(3).long(), torch.tensor([True, False, True])
    assert without(token_mean, length, group, kept, keep_denominator=True).tolist() == pytest.approx([0.1, 0, 0.1])
    assert without(token_mean, length, group, kept, keep_denominator=False).tolist() == pytest.approx([0.25, 0, 0.25])
