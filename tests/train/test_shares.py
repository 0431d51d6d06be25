"""Who gets what: by cost, in turn, all of it once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.data import TokenSequence, pack
from fastrl.train.shares import dealt, own_batches, packed_for_ranks, places_of_ranks

costs = st.lists(st.integers(1, 1000), max_size=40)


def test_the_longest_goes_to_whoever_has_least() -> None:
    assert dealt([3, 7, 5, 4], parts=2) == [[0, 1], [2, 3]]
    assert dealt([], parts=3) == [[], [], []]
    assert dealt([5, 5, 5], parts=1) == [[0, 1, 2]]


@settings(derandomize=True, deadline=None)
@given(costs, st.integers(1, 9))
def test_everything_is_dealt_once_and_no_part_is_more_than_one_item_above_another(items: list[int], n: int) -> None:
    parts = dealt(items, parts=n)
    assert sorted(place for part in parts for place in part) == list(range(len(items)))
    totals = [sum(items[place] for place in part) for part in parts]
    assert max(totals) - min(totals) <= max(items, default=0)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 5))
def test_parts_of_a_packed_step_are_of_about_equal_length(lengths: list[int], parts: int) -> None:
    sequences = [TokenSequence(np.arange(n), np.r_[0.0, np.ones(n - 1)]) for n in lengths]
    batches = pack(sequences, token_budget=64, parts=parts)
    assert sorted(place for batch in batches for place in batch.sequence.tolist()) == list(range(len(lengths)))
    sizes = [len(batch.target) for batch in batches]
    totals = [sum(sizes[place] for place in part) for part in dealt(sizes, parts=parts)]
    longest = max(n - 1 for n in lengths)
    # A rank that could have half of the work is not left with none of it.
    assert max(totals) <= 4 / 3 * (sum(totals) / parts + longest) + longest
    assert len(batches) >= min(parts, len(lengths))


def test_alone_a_process_has_every_batch_in_order() -> None:
    sequences = [TokenSequence(np.arange(n), np.r_[0.0, np.ones(n - 1)]) for n in (9, 3, 7, 5)]
    batches = packed_for_ranks(sequences, token_budget=8, device="cpu")
    assert len(batches) > 1
    assert all(one is other for one, other in zip(own_batches(batches), batches, strict=True))
    assert places_of_ranks(3) == [[0, 1, 2]]
