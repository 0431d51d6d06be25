from __future__ import annotations

import pytest
import torch

from fastrl.algorithms import Rounds, after_round, groups_with_signal, missing, waste

NAN = float("nan")


def test_a_group_has_signal_when_two_judged_rewards_differ() -> None:
    reward = torch.tensor([1.0, 0.0, 0.3, 0.3, 1.0, NAN, NAN, NAN, -2.0])
    group = torch.tensor([5, 5, 2, 2, 7, 7, 1, 1, 9])
    assert groups_with_signal(reward, group).tolist() == [True, True] + [False] * 7


def test_an_unjudged_member_does_not_hide_the_signal_of_the_others() -> None:
    assert groups_with_signal(torch.tensor([1.0, NAN, 0.0]), torch.zeros(3).long()).tolist() == [True] * 3


def test_negative_and_interleaved_rewards_are_compared_within_their_group() -> None:
    reward, group = torch.tensor([-1.0, -3.0, -1.0, -2.0]), torch.tensor([0, 1, 0, 1])
    assert groups_with_signal(reward, group).tolist() == [False, True, False, True]


def test_an_empty_batch_has_no_groups() -> None:
    assert groups_with_signal(torch.zeros(0), torch.zeros(0).long()).shape == (0,)


def test_rounds_go_on_until_the_batch_is_full() -> None:
    state = Rounds(wanted=8, max_rounds=3)
    assert missing(state) == 8
    state = after_round(state, drawn=8, with_signal=5)
    assert missing(state) == 3
    state = after_round(state, drawn=3, with_signal=3)
    assert missing(state) == 0
    assert waste(state) == pytest.approx(3 / 11)


def test_rounds_end_when_they_are_used_up_however_little_was_found() -> None:
    state = Rounds(wanted=8, max_rounds=1)
    for _ in range(2):
        assert missing(state) > 0
        state = after_round(state, drawn=8, with_signal=1)
    assert missing(state) == 0
    assert waste(state) == pytest.approx(14 / 16)


def test_without_extra_rounds_the_first_one_is_taken_as_it_is() -> None:
    state = after_round(Rounds(wanted=8, max_rounds=0), drawn=8, with_signal=2)
    assert missing(state) == 0


def test_groups_beyond_the_wanted_number_are_waste() -> None:
    assert waste(after_round(Rounds(wanted=2, max_rounds=0), drawn=4, with_signal=4)) == pytest.approx(0.5)
    assert waste(Rounds(wanted=2, max_rounds=0)) == 0


def test_more_signal_than_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="3 groups"):
        after_round(Rounds(wanted=2, max_rounds=0), drawn=3, with_signal=4)
