from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fastrl.losses.advantage import (
    batch_normalized,
    clamped,
    gpg,
    group_centered,
    group_normalized,
    leave_one_out,
    multi_objective,
    raw,
    return_to_go,
    token_reward,
    whiten,
)
from tests import oracle

NAN = float("nan")
# ragged, interleaved groups: 7 has four, 3 has three of which one could not be judged, 5 is alone, 9 all equal
REWARD = [1.0, 0.0, 2.0, 0.5, NAN, 0.25, 0.3, 0.3, 1.0, 0.0]
GROUP = [7, 3, 7, 7, 3, 5, 9, 9, 3, 7]
ESTIMATORS = {
    "group_normalized": (group_normalized, oracle.group_normalized),
    "population": (partial(group_normalized, ddof=0, eps=1e-6), partial(oracle.group_normalized, ddof=0, eps=1e-6)),
    "group_centered": (group_centered, oracle.group_centered),
    "leave_one_out": (leave_one_out, oracle.leave_one_out),
    "batch_normalized": (batch_normalized, oracle.batch_normalized),
    "raw": (raw, oracle.raw),
    "gpg": (gpg, oracle.gpg),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_advantages_are_the_papers_on_ragged_groups_with_an_unjudged_rollout(name: str, dtype: torch.dtype) -> None:
    ours, theirs = ESTIMATORS[name]
    got = ours(torch.tensor(REWARD, dtype=dtype), torch.tensor(GROUP))
    expected = torch.tensor(theirs(np.array(REWARD), GROUP), dtype=torch.float64)
    tight = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.double(), expected, **tight)
    assert got.dtype == dtype


def test_grpo_of_two_right_and_two_wrong() -> None:
    got = group_normalized(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.zeros(4).long(), eps=0.0)
    assert got.tolist() == pytest.approx([0.75**0.5, 0.75**0.5, -(0.75**0.5), -(0.75**0.5)])


def test_rloo_compares_with_the_others_only() -> None:
    assert leave_one_out(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3).long()).tolist() == pytest.approx([1.5, -1.5, 0])


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "raw"])
def test_equal_rewards_and_a_group_of_one_give_exactly_zero(name: str) -> None:
    reward = torch.tensor([0.1, 0.1, 0.1, 0.7, 1.0, 0.0])
    got = ESTIMATORS[name][0](reward, torch.tensor([0, 0, 0, 1, 2, 2]))
    assert got[:4].tolist() == [0.0] * 4
    assert got[4] > 0 > got[5]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_unjudged_rollout_changes_nobody_elses_advantage(name: str) -> None:
    ours = ESTIMATORS[name][0]
    judged = [i for i, r in enumerate(REWARD) if r == r]
    everyone = ours(torch.tensor(REWARD), torch.tensor(GROUP))
    without = ours(torch.tensor(REWARD)[judged], torch.tensor(GROUP)[judged])
    assert torch.equal(everyone[judged], without)
    assert everyone[4] == 0


def test_gpg_scales_up_by_the_share_of_groups_that_teach() -> None:
    reward, group = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    assert gpg(reward, group).tolist() == [1.0, -1.0, 0.0, 0.0]  # centred 0.5, alpha 4 / 2


def test_gpg_of_a_batch_without_any_signal_is_zero() -> None:
    assert gpg(torch.ones(4), torch.tensor([0, 0, 1, 1])).tolist() == [0.0] * 4


def test_gdpo_normalises_each_reward_before_it_weighs_them() -> None:
    reward = [[1.0, 100.0], [0.0, 300.0], [1.0, NAN], [0.0, 200.0], [NAN, NAN], [1.0, 100.0]]
    group, weights = [0, 0, 0, 1, 1, 1], [1.0, 0.5]
    got = multi_objective(torch.tensor(reward).double(), torch.tensor(group), torch.tensor(weights))
    expected = torch.tensor(oracle.multi_objective(np.array(reward), group, weights))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert got[4] == 0


def test_gdpo_tells_apart_what_a_sum_of_rewards_cannot() -> None:
    """Rewards (1, 0) and (0, 1) sum to the same; the rarer success is worth more."""
    reward = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    got = multi_objective(reward, torch.zeros(4).long(), torch.tensor([1.0, 2.0]))
    assert group_centered(reward.sum(1), torch.zeros(4).long()).tolist() == [0.0] * 4
    assert got[1] > 0 > got[0]


def test_gdpo_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="weights"):
        multi_objective(torch.zeros(4, 2), torch.zeros(4).long(), torch.ones(3))


def test_clamped_holds_another_advantage() -> None:
    got = clamped(torch.tensor([30.0, -30.0, 0.0]), torch.zeros(3).long(), advantage=group_centered, limit=10.0)
    assert got.tolist() == [10.0, -10.0, 0.0]


def test_whitened_advantages_have_mean_zero_and_variance_one_over_trained_tokens() -> None:
    advantage = torch.tensor([5.0, NAN, 1.0, 3.0, 100.0])
    trained = torch.tensor([True, False, True, True, False])
    got = whiten(advantage, trained)
    assert got.tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("values", [[0.1] * 7, [3.0], []])
def test_whitening_what_does_not_vary_gives_exactly_zero(values: list[float]) -> None:
    assert not whiten(torch.tensor(values), torch.ones(len(values)).bool()).any()


SCORE = torch.tensor([2.0, -1.0, 9.0], dtype=torch.float64)
KL_TOKEN = torch.tensor([NAN, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
BORDERS = torch.tensor([0, 4, 6, 7])
TRAINED = torch.tensor([False, True, False, True, True, True, False])


def test_the_score_sits_on_the_last_trained_token_and_kl_on_every_one() -> None:
    got = token_reward(SCORE, KL_TOKEN, BORDERS, TRAINED, coef=0.5)
    assert got.tolist() == pytest.approx([0, -0.05, 0, 2 - 0.15, -0.2, -1 - 0.25, 0])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_to_go_are_the_sums_of_what_is_still_to_come(gamma: float) -> None:
    got = return_to_go(SCORE, KL_TOKEN, BORDERS, TRAINED, coef=0.5, gamma=gamma)
    expected = [
        oracle.return_to_go(score, KL_TOKEN[a:b].numpy(), TRAINED[a:b].numpy(), 0.5, gamma)
        for score, a, b in zip(SCORE.tolist(), [0, 4, 6], [4, 6, 7], strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(np.concatenate(expected)), rtol=1e-12, atol=1e-13)


def test_without_kl_the_return_is_the_score_at_every_trained_token() -> None:
    got = return_to_go(SCORE, torch.zeros(7).double(), BORDERS, TRAINED, coef=0.0)
    assert got.tolist() == [0, 2, 0, 2, -1, -1, 0]
