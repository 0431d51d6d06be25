"""Rollouts and rows as columns beside their ids, before any shift."""

from __future__ import annotations

import numpy as np

from fastrl.train.sequences import rollout_sequences, supervised_sequence, trained_length
from fastrl.types import Rollout

ROLLOUT = Rollout((7, 8), (1, 2, 3), (-0.1, -0.2, -0.3), "stop", 0)


def test_a_rollout_trains_its_completion_and_never_its_prompt() -> None:
    (found,) = rollout_sequences([ROLLOUT], weight=[0.25], advantage=[-2.0])
    assert list(found.ids) == [7, 8, 1, 2, 3]
    assert list(found.weight) == [0, 0, 0.25, 0.25, 0.25]
    assert found.advantage is not None
    assert list(found.advantage) == [0, 0, -2, -2, -2]
    np.testing.assert_allclose(found.sampler_logprob, [0, 0, -0.1, -0.2, -0.3], rtol=1e-6)
    assert trained_length(ROLLOUT) == 3


def test_tokens_that_the_policy_did_not_choose_have_no_weight_and_keep_the_advantage() -> None:
    mixed = Rollout((7,), (1, 2, 3), (-0.1, 0.0, -0.3), "stop", 0, is_sampled=(True, False, True))
    _, found = rollout_sequences([ROLLOUT, mixed], weight=[0.25, 0.5], advantage=[-2.0, 1.0])
    assert list(found.weight) == [0, 0.5, 0, 0.5]
    assert found.advantage is not None
    assert list(found.advantage) == [0, 1, 1, 1]
    assert trained_length(mixed) == 2


def test_several_rollouts_keep_their_own_numbers_and_none_make_none() -> None:
    other = Rollout((9,), (4,), (-0.5,), "length", 0)
    first, second = rollout_sequences([ROLLOUT, other], weight=[0.25, 0.125], advantage=[-2.0, 3.0])
    assert list(first.ids) == [7, 8, 1, 2, 3]
    assert [list(column) for column in (second.ids, second.weight, second.advantage)] == [[9, 4], [0, 0.125], [0, 3]]  # type: ignore[arg-type]
    np.testing.assert_allclose(second.sampler_logprob, [0, -0.5])
    assert rollout_sequences([], weight=[], advantage=[]) == []


def test_a_row_trains_where_its_mask_says() -> None:
    found = supervised_sequence([4, 5, 6], [False, True, False], weight=0.125)
    assert list(found.ids) == [4, 5, 6]
    assert list(found.weight) == [0, 0.125, 0]
    assert found.advantage is None
