"""Which positions sequences have in common: the same tokens up to them, and nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastrl.data.pack import TokenSequence, pack
from fastrl.data.prefixes import bundles, first_alike, in_order


def arrays(*sequences: list[int]) -> list[np.ndarray]:
    return [np.array(each, dtype=np.int64) for each in sequences]


def test_two_completions_of_one_prompt_share_its_three_positions() -> None:
    (batch,) = pack(
        [TokenSequence((1, 2, 3, 4, 5), (0, 0, 0, 1, 1)), TokenSequence((1, 2, 3, 6), (0, 0, 0, 1))], token_budget=100
    )
    # fed: 1 2 3 4 | 1 2 3
    assert batch.shared is not None
    assert batch.shared.kept.tolist() == [3, 4, 5, 6]  # the shorter beginning is the first in the order of tokens
    assert batch.shared.place.tolist() == [1, 2, 3, 0, 1, 2, 3]


def test_sequences_that_begin_differently_share_nothing() -> None:
    (batch,) = pack([TokenSequence((1, 2, 3), (0, 1, 1)), TokenSequence((4, 2, 3), (0, 1, 1))], token_budget=100)
    assert batch.shared is None


def test_the_order_puts_the_alike_side_by_side_and_counts_what_they_share() -> None:
    order, common = in_order(arrays([5, 1], [2, 2, 9], [5, 1, 7], [2, 2], [300]))
    assert order.tolist() == [3, 1, 0, 2, 4]
    assert common.tolist() == [0, 2, 0, 2, 0]


def test_a_bundle_holds_what_shares_a_quarter_and_ends_at_its_limit() -> None:
    lengths = np.array([4, 4, 4, 4, 8])
    order, common = np.arange(5), np.array([0, 3, 3, 1, 1])
    assert bundles(lengths, order, common, most=100) == [[0, 1, 2, 3, 4]]  # 1 of 4 is a quarter
    assert bundles(lengths, order, common, most=8) == [[0, 1], [2, 3], [4]]
    assert bundles(lengths, order, np.array([0, 3, 0, 3, 0]), most=100) == [[0, 1], [2, 3], [4]]


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12)


@given(sequences=SEQUENCES, budget=st.integers(9, 40), parts=st.integers(1, 3))
def test_positions_are_one_exactly_when_all_tokens_up_to_them_are_equal(
    sequences: list[list[int]], budget: int, parts: int
) -> None:
    batches = pack(
        [TokenSequence(tuple(ids), (0.0,) + (1.0,) * (len(ids) - 1)) for ids in sequences],
        token_budget=budget,
        parts=parts,
    )
    assert sorted(s for batch in batches for s in batch.sequence.tolist()) == list(range(len(sequences)))
    for batch in batches:
        assert len(batch.target) <= budget
        beginnings = [
            tuple(sequences[s][: t + 1]) for s in batch.sequence.tolist() for t in range(len(sequences[s]) - 1)
        ]
        distinct = len(set(beginnings))
        if batch.shared is None:
            assert distinct > 0.9 * len(beginnings)
            continue
        assert len(batch.shared.kept) == distinct
        assert batch.shared.kept.diff().gt(0).all()
        stands_for = [beginnings[i] for i in batch.shared.kept.tolist()]
        assert [stands_for[u] for u in batch.shared.place.tolist()] == beginnings


def test_what_is_shared_with_one_that_is_not_next_is_the_least_in_between() -> None:
    fed = arrays([1, 1, 1], [1, 1, 2], [1, 3, 3])
    order, common = in_order(fed)
    members, lengths = np.array([0, 2]), np.array([3, 3])
    assert order.tolist() == [0, 1, 2]
    assert first_alike(members, np.array([0, 3]), lengths, common).tolist() == [0, 1, 2, 0, 4, 5]
