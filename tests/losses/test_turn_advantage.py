from __future__ import annotations

import torch

from fastrl.losses.turn_advantage import turn_advantage, turn_returns

NAN = float("nan")


def test_a_turns_return_counts_what_came_after_it() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, NAN], [1.0, NAN, 4.0]])
    expected = torch.tensor([[3.0, 4.0, 4.0], [2.0, 2.0, NAN], [2.0, NAN, 4.0]])
    torch.testing.assert_close(turn_returns(reward, gamma=0.5), expected, equal_nan=True)


def test_turns_compare_with_the_same_turn_of_their_group() -> None:
    group = torch.tensor([0, 0, 1, 1])
    reward = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, NAN], [5.0, 7.0]])
    # returns (gamma 1): [1, 0], [2, 2], [5, -], [12, 7]; a pair (x, y) normalises to -+ sqrt(1/2)
    half = 0.5**0.5
    expected = torch.tensor([[-half, -half], [half, half], [-half, 0.0], [half, 0.0]])
    torch.testing.assert_close(turn_advantage(reward, group), expected, rtol=1e-3, atol=1e-3)


def test_no_turns_make_no_advantage() -> None:
    assert turn_advantage(torch.zeros(3, 0), torch.tensor([0, 0, 1])).shape == (3, 0)
    assert turn_advantage(torch.full((2, 1), NAN), torch.tensor([0, 0])).tolist() == [[0.0], [0.0]]
