from __future__ import annotations

import math

import torch

from fastrl.train.online_pairs import best_and_worst
from fastrl.types import Rollout


def test_the_best_meets_the_worst_and_ties_and_missing_verdicts_make_no_pair() -> None:
    rollouts = [Rollout((1, 2), (i,), (-0.5,), "stop", 0) for i in range(10)]
    nan = math.nan
    reward = torch.tensor([1.0, 3.0, 3.0, 0.5, 2.0, 2.0, nan, nan, 4.0, nan])
    group = torch.tensor([7, 7, 7, 7, 2, 2, 2, 5, 5, 5])
    paired = best_and_worst(rollouts, reward, group)
    assert [(pair.chosen.ids, pair.rejected.ids) for pair in paired.pairs] == [((1, 2, 1), (1, 2, 3))]
    assert paired.pairs[0].chosen.is_trained == (False, False, True)
    assert (paired.margins, paired.n_tied, paired.n_unjudged) == ([2.5], 1, 1)


def test_tokens_the_policy_did_not_choose_are_not_trained() -> None:
    rollout = Rollout((1,), (2, 3, 4), (-1.0, 0.0, -1.0), "stop", 0, is_sampled=(True, False, True))
    other = Rollout((1,), (5,), (-1.0,), "stop", 0)
    (pair,) = best_and_worst([other, rollout], torch.tensor([0.0, 1.0]), torch.tensor([0, 0])).pairs
    assert pair.chosen.is_trained == (False, True, False, True)
