"""Group advantages against a NumPy loop in float64, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.ops.backend import choose
from fastrl.ops.group_advantage import IMPLEMENTATIONS, Baseline, Scale, group_advantage


def runs_here(backend: str) -> bool:
    try:
        choose(backend, torch.zeros(1), IMPLEMENTATIONS)
    except RuntimeError:
        return False
    return True


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not runs_here(name), reason=f"{name} is not built here"))
    for name in ("reference", "torch", "native", "triton")
]
AVAILABLE = [name for name in ("reference", "torch", "native", "triton") if runs_here(name)]


def std(r, ddof):
    return np.std(r, ddof=ddof) if len(r) > ddof and np.ptp(r) > 0 else 0.0


def oracle(reward, group, baseline, scale, ddof, eps):
    """After the definitions, rollout by rollout."""
    advantage = np.zeros(len(reward))
    judged = np.isfinite(reward)
    for s in np.flatnonzero(judged):
        mates = np.flatnonzero(judged & (group == group[s]))
        others = mates[mates != s]
        r = reward[mates]
        if baseline == Baseline.NONE:
            advantage[s] = reward[s]
        elif np.ptp(r) > 0:
            advantage[s] = reward[s] - np.mean(r if baseline == Baseline.MEAN else reward[others])
        if scale != Scale.NONE:
            spread = std(r if scale == Scale.GROUP else reward[judged], ddof)
            advantage[s] = advantage[s] / (spread + eps) if spread > 0 else 0.0
    return advantage


@pytest.mark.parametrize("backend", BACKENDS)
def test_grpo_divides_the_distance_from_the_mean_by_the_sample_deviation(backend):
    reward = torch.tensor([0.0, 5.0, 1.0, 7.0])
    group = torch.tensor([3, -1, 3, -1])  # interleaved, neither dense nor sorted
    advantage = group_advantage(reward, group, eps=0.0, backend=backend)
    half = 0.5**0.5  # two rewards at distance d: (d / 2) / (d / sqrt 2)
    torch.testing.assert_close(advantage, torch.tensor([-half, -half, half, half]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leave_one_out_compares_with_the_mean_of_the_others(backend):
    reward = torch.tensor([1.0, 0.0, 0.0, 8.0])
    advantage = group_advantage(
        reward, torch.tensor([0, 0, 0, 1]), baseline=Baseline.LEAVE_ONE_OUT, scale=Scale.NONE, backend=backend
    )
    torch.testing.assert_close(advantage, torch.tensor([1.0, -0.5, -0.5, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_scale_divides_by_the_deviation_of_all_rewards(backend):
    advantage = group_advantage(
        torch.tensor([0.0, 2.0, 4.0, 6.0]), torch.tensor([0, 0, 1, 1]), scale=Scale.BATCH, eps=0.0, backend=backend
    )
    spread = (20 / 3) ** 0.5  # mean 3, squares 9 + 1 + 1 + 9
    torch.testing.assert_close(advantage, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / spread)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("baseline", [Baseline.MEAN, Baseline.LEAVE_ONE_OUT])
@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_lone_rollouts_have_exactly_no_advantage(backend, baseline, scale, dtype):
    # 0.1 has no finite binary expansion: a rounded mean of 3, 7 or 10 of them differs from 0.1.
    reward = torch.tensor([0.1] * 3 + [0.1] * 7 + [0.7] * 10 + [0.3], dtype=dtype)
    group = torch.tensor([0] * 3 + [1] * 7 + [2] * 10 + [3])
    advantage = group_advantage(reward, group, baseline=baseline, scale=scale, backend=backend)
    assert (advantage == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_without_reward_leaves_mean_and_deviation(backend):
    with_nan = group_advantage(torch.tensor([1.0, torch.nan, 2.0, 6.0]), torch.zeros(4).long(), backend=backend)
    without = group_advantage(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3).long(), backend=backend)
    assert with_nan[1] == 0
    assert with_nan[[0, 2, 3]].tolist() == without.tolist()
    for r in (0.1, -0.1):  # a hidden 0 would be the least or the greatest
        reward = torch.tensor([r, r, r, torch.nan], dtype=torch.float64)
        assert not group_advantage(reward, torch.zeros(4).long(), backend=backend).any()
    nothing = group_advantage(torch.full((3,), torch.nan), torch.zeros(3).long(), backend=backend)
    assert nothing.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [Scale.GROUP, Scale.BATCH])
def test_without_a_spread_to_divide_by_a_raw_reward_gives_nothing(backend, scale):
    reward, group = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([0, 0, 1])
    options = {"baseline": Baseline.NONE, "backend": backend}
    assert group_advantage(reward, group, scale=scale, **options).tolist() == [0.0, 0.0, 0.0]
    assert group_advantage(reward, group, scale=Scale.NONE, **options).tolist() == [3.0, 3.0, 3.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.integers(0, 24),
    seed=st.integers(0, 999),
    baseline=st.sampled_from(list(Baseline)),
    scale=st.sampled_from(list(Scale)),
    ddof=st.integers(0, 2),
    backend=st.sampled_from(AVAILABLE),
)
def test_ragged_groups_agree_with_the_definition_and_follow_a_permutation(size, seed, baseline, scale, ddof, backend):
    random = np.random.default_rng(seed)
    # Few values, so that equal groups are common; an offset that f32 means would lose.
    reward = (1000 + random.integers(0, 3, size) / 8).astype(np.float32)
    reward[random.random(size) < 0.15] = np.nan
    group = random.integers(-3, 4, size) * 10**12
    options = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": 1e-4, "backend": backend}
    got = group_advantage(torch.tensor(reward), torch.tensor(group, dtype=torch.int64), **options)
    expected = oracle(reward.astype(float), group, baseline, scale, ddof, 1e-4)
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=1e-7)
    order = torch.tensor(random.permutation(size), dtype=torch.int64)
    moved = group_advantage(torch.tensor(reward)[order], torch.tensor(group)[order], **options)
    torch.testing.assert_close(moved, got[order], rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_f32_rewards_far_from_zero_are_centred_in_f64(backend):
    reward = torch.tensor([2.0**24, 2.0**24 + 2, 2.0**24 + 8])
    advantage = group_advantage(reward, torch.zeros(3).long(), scale=Scale.NONE, backend=backend)
    torch.testing.assert_close(advantage, torch.tensor([-10 / 3, -4 / 3, 14 / 3]), rtol=1e-7, atol=0)


def test_input_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="group must be"):
        group_advantage(torch.ones(2), torch.zeros(3).long())
    with pytest.raises(ValueError, match="int64"):
        group_advantage(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="ddof"):
        group_advantage(torch.ones(2), torch.zeros(2).long(), ddof=-1)
