"""Which groups make a round, how long stragglers may take, and what a completion in segments is."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.rollout.engine import Sampling
from fastrl.train.partial import Group, chosen, extended, is_feasible, most_outstanding, new_group
from fastrl.train.prompts import Prompt
from fastrl.types import Rollout

PROMPT = Prompt((1, 2), "question", {})
DONE: Any = object()


def group(ordinal: int, begun: int, *, is_done: bool = True) -> Group:
    found = new_group(ordinal, PROMPT, begun=begun, seeds=[0])
    found.experience = DONE if is_done else None
    return found


def test_segments_join_into_one_completion_whose_tokens_carry_their_versions():
    sampling = Sampling(max_completion_length=5)
    first, is_done = extended(None, Rollout((1, 2), (7, 8), (-1.0, -2.0), "length", 3), sampling=sampling, context=99)
    assert not is_done
    second, is_done = extended(first, Rollout((1, 2), (9,), (-3.0,), "stop", 4), sampling=sampling, context=99)
    assert is_done
    assert second == Rollout((1, 2), (7, 8, 9), (-1.0, -2.0, -3.0), "stop", 3, token_version=(3, 3, 4))


@pytest.mark.parametrize(("limit", "context"), [(3, 99), (99, 5)])
def test_a_completion_ends_at_its_limit_or_at_the_context(limit: int, context: int):
    sampling = Sampling(max_completion_length=limit)
    rollout = Rollout((1, 2), (7, 8), (-1.0, -2.0), "length", 3)
    first, is_done = extended(None, rollout, sampling=sampling, context=context)
    assert not is_done
    second, is_done = extended(first, Rollout((1, 2), (9,), (-3.0,), "length", 3), sampling=sampling, context=context)
    assert is_done
    assert second.finish_reason == "length"
    assert second.token_version is None  # all are of the version that began it


def test_an_engine_that_failed_ends_the_completion():
    rollout, is_done = extended(None, Rollout((1, 2), (), (), "error", 3), sampling=Sampling(), context=99)
    assert is_done
    assert rollout.finish_reason == "error"


def test_a_round_takes_what_is_finished_and_leaves_stragglers():
    groups = [group(0, 0, is_done=False), group(1, 0), group(2, 1), group(3, 1)]
    taken = chosen(groups, wanted=2, size=2, next_round=1, depth=2)
    assert taken is not None
    assert [each.ordinal for each in taken] == [1, 2]
    assert chosen(groups[:2], wanted=2, size=2, next_round=1, depth=2) is None  # not enough


def test_a_round_waits_for_the_straggler_that_is_due():
    groups = [group(0, 0, is_done=False), group(1, 1), group(2, 1)]
    assert chosen(groups, wanted=2, size=2, next_round=2, depth=2) is None
    groups[0].experience = DONE
    taken = chosen(groups, wanted=2, size=2, next_round=2, depth=2)
    assert taken is not None
    assert [each.ordinal for each in taken] == [0, 1]


def test_a_round_looks_ahead_to_what_is_due_later():
    """Four are due by round 3; were two others taken for round 2, round 3 could not hold the four."""
    groups = [group(i, 1, is_done=False) for i in range(4)] + [group(i, 2) for i in (4, 5)]
    assert chosen(groups, wanted=2, size=2, next_round=2, depth=2) is None


@given(st.lists(st.integers(0, 4), max_size=9), st.integers(1, 3))
def test_feasible_is_that_some_order_of_learning_meets_every_deadline(due: list[int], size: int):
    """Against earliest deadline first, simulated round by round."""
    left = sorted(due)
    meets = True
    for number in range(6):
        meets &= all(last >= number for last in left)
        left = left[size:]
    assert is_feasible(due, next_round=0, size=size) == (meets and not left)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_whatever_finishes_when_no_group_is_ever_too_old_and_none_waits_for_ever(data: Any, depth: int, size: int):
    groups: list[Group] = []
    learned: list[tuple[int, Group]] = []
    ordinal = next_round = weights = 0
    while next_round < 8:
        while len(groups) < most_outstanding(size, depth) and is_feasible(
            [each.begun + depth for each in groups] + [weights + depth], next_round=next_round, size=size
        ):
            groups.append(group(ordinal, weights, is_done=False))
            ordinal += 1
        taken = chosen(groups, wanted=size, size=size, next_round=next_round, depth=depth)
        if taken is None:
            going = [each for each in groups if each.experience is None]
            assert going, "nothing is unfinished and no round can be made"
            going[data.draw(st.integers(0, len(going) - 1))].experience = DONE
            continue
        learned += [(next_round, each) for each in taken]
        groups = [each for each in groups if each not in taken]
        weights, next_round = next_round, next_round + 1
    assert all(number - each.begun <= depth for number, each in learned)
    assert len({each.ordinal for _, each in learned}) == len(learned)


def test_half_of_the_bound_is_sampled_at_once():
    assert [most_outstanding(4, depth) for depth in (1, 2, 3, 5)] == [4, 6, 8, 12]
    for size, depth in product((1, 2, 3), (1, 2, 3)):
        assert most_outstanding(size, depth) <= size * (depth + 1)
