from __future__ import annotations

from fastrl.train.rollout_tensors import rollouts_as_tensors, rollouts_from_tensors
from fastrl.types import Rollout


def test_rollouts_come_back_from_tensors_to_the_last_bit():
    rollouts = [
        Rollout((1, 2, 3), (4, 5), (-0.1, -1 / 3), "stop", 7),
        Rollout((9,), (), (), "error", 8),
        Rollout((1, 2), (6, 7, 8), (-1e-12, 0.0, -45.678), "length", 3, token_version=(3, 4, 4)),
        Rollout((1, 2), (6, 7), (-1.0, -2.0), "stop", 3, is_sampled=(True, False)),
    ]
    assert rollouts_from_tensors(rollouts_as_tensors(rollouts)) == rollouts
    assert rollouts_from_tensors(rollouts_as_tensors([])) == []
