from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.data import TokenSequence, pack, unpack, unpack_columns

OPTIONAL = ("advantage", "sampler_logprob", "old_logprob", "ref_logprob", "old_value", "returns")


def made(lengths, seed=0):
    """Sequences of random ids; every column is a different function of (sequence, place), so mix-ups show."""
    generator = np.random.default_rng(seed)
    sequences = []
    for s, n in enumerate(lengths):
        columns = {name: (k + 1) * 1000.0 + 100 * s + np.arange(n) for k, name in enumerate(OPTIONAL)}
        weight = generator.integers(0, 8, n) / 8  # eighths: sums are exact in any order
        weight[0] = 0
        sequences.append(TokenSequence(generator.integers(0, 1000, n), weight, **columns))
    return sequences


repeatable = settings(derandomize=True, deadline=None)
lengths = st.lists(st.integers(2, 40), max_size=30)


def test_labels_are_shifted_by_one():
    (batch,) = pack([TokenSequence((5, 6, 7), (0.0, 0.25, 0.75), old_logprob=(9.0, -1.0, -2.0))], token_budget=8)
    assert batch.input_ids.tolist() == [5, 6]
    assert batch.target.tolist() == [6, 7]
    assert batch.weight.tolist() == [0.25, 0.75]
    assert batch.old_logprob.tolist() == [-1.0, -2.0]
    assert batch.position_ids.tolist() == [0, 1]
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert batch.advantage is None


def test_best_fit_decreasing_fills_the_fullest_bin_that_still_takes_a_sequence():
    # Positions 7, 5, 4, 1 in bins of 10: first fit would put the 1 beside the 7, and leave 3 for nothing.
    batches = pack(made([6, 2, 8, 5]), token_budget=10)
    assert [batch.sequence.tolist() for batch in batches] == [[2], [0, 1, 3]]
    assert [batch.max_seqlen for batch in batches] == [7, 5]


def test_dtypes_are_those_of_the_token_batch():
    (batch,) = pack(made([3, 4]), token_budget=8)
    for name in ("input_ids", "position_ids", "target", "sequence"):
        assert getattr(batch, name).dtype == torch.int64, name
    for name in ("weight", *OPTIONAL):
        assert getattr(batch, name).dtype == torch.float32, name
    assert batch.cu_seqlens.dtype == torch.int32


@repeatable
@given(lengths)
def test_every_position_is_packed_once_aligned_and_within_the_budget(lengths):
    sequences = made(lengths)
    batches = pack(sequences, token_budget=50)
    assert sorted(s for batch in batches for s in batch.sequence.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert 0 < len(batch.target) <= 50
        assert batch.max_seqlen == batch.cu_seqlens.diff().max()
        for name in ("input_ids", "position_ids", "weight", *OPTIONAL):
            assert len(getattr(batch, name)) == batch.cu_seqlens[-1]
        borders = batch.cu_seqlens.tolist()
        for s, start, stop in zip(batch.sequence.tolist(), borders[:-1], borders[1:], strict=True):
            given_one = sequences[s]
            assert batch.input_ids[start:stop].tolist() == given_one.ids[:-1].tolist()
            assert batch.target[start:stop].tolist() == given_one.ids[1:].tolist()
            assert batch.position_ids[start:stop].tolist() == list(range(len(given_one.ids) - 1))
            for name in ("weight", *OPTIONAL):
                assert getattr(batch, name)[start:stop].tolist() == getattr(given_one, name)[1:].tolist(), name


@repeatable
@given(lengths, st.integers(39, 400), st.randoms(use_true_random=False))
def test_the_weighted_sum_does_not_depend_on_budget_or_order(lengths, budget, random):
    def total(sequences, token_budget):
        batches = pack(sequences, token_budget=token_budget)
        return sum(float((batch.weight.double() * (batch.target % 7)).sum()) for batch in batches)

    sequences = made(lengths)
    exact = float(sum((each.weight * (each.ids % 7)).sum() for each in sequences))
    assert total(sequences, 39) == exact
    random.shuffle(sequences)
    assert total(sequences, budget) == exact


@repeatable
@given(lengths)
def test_packing_is_deterministic_and_leaves_no_two_batches_that_fit_in_one(lengths):
    sequences = made(lengths)
    once, twice = (pack(sequences, token_budget=50) for _ in range(2))
    assert [batch.sequence.tolist() for batch in once] == [batch.sequence.tolist() for batch in twice]
    emptiest = sorted(len(batch.target) for batch in once)[:2]
    assert len(emptiest) < 2 or sum(emptiest) > 50


@repeatable
@given(lengths)
def test_unpacked_columns_pack_again_as_they_were(lengths):
    sequences = made(lengths)
    batches = pack(sequences, token_budget=50)
    columns = unpack_columns([batch.old_logprob for batch in batches], batches)
    for column, each in zip(columns, sequences, strict=True):
        assert column.tolist() == [0.0, *each.old_logprob[1:].tolist()]
    again = [dataclasses.replace(each, old_logprob=column) for each, column in zip(sequences, columns, strict=True)]
    for before, after in zip(batches, pack(again, token_budget=50), strict=True):
        assert torch.equal(before.old_logprob, after.old_logprob)


def test_unpack_cuts_at_the_borders_and_keeps_the_gradient():
    (batch,) = pack(made([3, 5]), token_budget=8)
    value = torch.ones(6, requires_grad=True)
    first, second = unpack(value, batch)
    assert (len(first), len(second)) == (2, 4)
    (2 * first.sum() + 3 * second.sum()).backward()
    assert value.grad.tolist() == [2, 2, 3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"T=6, got shape \(5,\)"):
        unpack(torch.ones(5), batch)


def test_tuples_arrays_and_tensors_pack_alike():
    columns = {"ids": [3, 1, 2], "weight": [0.0, 0.5, 0.5], "advantage": [0.0, 1.0, 2.0]}
    batches = [
        pack([TokenSequence(**{name: make(values) for name, values in columns.items()})], token_budget=4)[0]
        for make in (tuple, np.array, torch.tensor)
    ]
    for batch in batches[1:]:
        assert torch.equal(batch.target, batches[0].target)
        assert torch.equal(batch.weight, batches[0].weight)
        assert torch.equal(batch.advantage, batches[0].advantage)


def test_no_sequences_make_no_batches():
    assert pack([], token_budget=8) == []
    assert unpack_columns([], []) == []


def test_a_sequence_of_exactly_the_budget_fits_and_one_more_is_refused():
    assert len(pack(made([9]), token_budget=8)) == 1
    with pytest.raises(ValueError, match=r"sequence 1 has 10 tokens, 9 positions, .*token_budget to at least 9"):
        pack(made([3, 10]), token_budget=8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (TokenSequence((1,), (0.0,)), "sequence 1: needs at least 2 tokens"),
        (TokenSequence((), ()), "sequence 1: needs at least 2 tokens"),
        (TokenSequence((1, 2), (0.5, 0.5)), r"sequence 1: weight\[0\] must be 0"),
        (TokenSequence((1, 2), (0.0, float("nan"))), "sequence 1: weight must be finite, got nan at 1"),
        (TokenSequence((1, 2), (0.0, 1.0, 1.0)), r"sequence 1: weight must be \[2\] as ids, got shape \(3,\)"),
        (TokenSequence((1, 2.5), (0.0, 1.0)), "ids must be one-dimensional integers, got float64"),
        (TokenSequence((1, 2), (0.0, 1.0), advantage=(0.0, 1.0)), "advantage must be on all 2 .* sequence 0 has none"),
    ],
)
def test_a_wrong_sequence_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        pack([TokenSequence((1, 2), (0.0, 1.0)), wrong], token_budget=8)


def test_batches_of_another_call_are_refused():
    one, two = pack(made([3, 10]), token_budget=9)
    with pytest.raises(ValueError, match="all those of one pack call"):
        unpack_columns([one.weight], [one])
    with pytest.raises(ValueError, match="got 1 for 2 batches"):
        unpack_columns([one.weight], [one, two])


def test_two_thousand_sequences_pack_in_milliseconds():
    sequences = made(np.random.default_rng(0).integers(100, 300, 2000))
    fastest = min(_seconds(sequences) for _ in range(5))
    assert fastest < 0.25  # 15 to 50 ms on an idle core; the bound only catches a loop over tokens


def _seconds(sequences):
    start = time.perf_counter()
    pack(sequences, token_budget=8192)
    return time.perf_counter() - start


def test_the_sequences_of_a_group_share_a_batch_and_keep_their_order() -> None:
    rows = made((5, 2, 4, 3, 6, 2))
    batches = pack(rows, token_budget=7, group=[0, 0, 1, 1, 2, 2])
    # Positions of the groups: 4 + 1, 3 + 2, 5 + 1.
    assert [batch.sequence.tolist() for batch in batches] == [[4, 5], [0, 1], [2, 3]]
    assert [len(batch.target) for batch in batches] == [6, 5, 5]
    together = pack(rows, token_budget=11, group=[7, 3, 3, 5, 5, 7])
    # 4 + 1, 1 + 3 and 2 + 5 positions; best fit puts the four beside the seven.
    assert [batch.sequence.tolist() for batch in together] == [[1, 2, 3, 4], [0, 5]]


def test_a_group_over_the_budget_and_a_wrong_number_of_groups_are_named() -> None:
    rows = made((5, 4))
    with pytest.raises(ValueError, match=r"sequence 0 and those .* take 7 positions, over the token budget of 6"):
        pack(rows, token_budget=6, group=[1, 1])
    with pytest.raises(ValueError, match="a number for each of the 2 sequences, got 1"):
        pack(rows, token_budget=8, group=[1])
