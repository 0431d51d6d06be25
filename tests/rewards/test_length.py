from __future__ import annotations

import pickle

import pytest

from fastrl.rewards import Length, Reward


def test_the_penalty_is_free_then_linear_then_full():
    reward = Length(start=80, limit=100)
    ids = [[1] * n for n in (0, 80, 85, 90, 100, 500)]
    assert reward(ids) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_it_is_called_length_and_can_travel_to_another_process():
    assert Reward(Length()).name == "length"
    assert pickle.loads(pickle.dumps(Length(limit=10))) == Length(limit=10)


def test_a_start_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="0 <= start < limit, got start=9, limit=9"):
        Length(start=9, limit=9)
