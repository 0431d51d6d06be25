"""The ragged group statistics against the specification in float64, and what a GPU must repeat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.kernels import group_advantage as kernel
from fastrl.ops.group_advantage import Baseline, Scale, group_advantage


def inputs(size, groups, *, seed=0, dtype=torch.float32, device="cpu"):
    """Few values, so that equal groups are common; an offset that f32 means would lose; some not judged."""
    generator = torch.Generator().manual_seed(seed)
    reward = 1000 + torch.randint(3, (size,), generator=generator) / 8
    reward = torch.where(torch.rand(size, generator=generator) < 0.15, torch.nan, reward)
    group = (torch.randint(groups, (size,), generator=generator) - groups // 2) * 10**12
    return reward.to(device, dtype), group.to(device)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(0, 24),
    groups=st.integers(1, 6),
    seed=st.integers(0, 999),
    baseline=st.sampled_from(list(Baseline)),
    scale=st.sampled_from(list(Scale)),
    ddof=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_groups_longer_than_a_block_agree_with_the_definition(size, groups, seed, baseline, scale, ddof, dtype):
    reward, group = inputs(size, groups, seed=seed, dtype=dtype)
    got = kernel.forward(reward, group, int(baseline), int(scale), ddof, 1e-4, tile=(4, 1))
    options = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": 1e-4}
    truth = group_advantage(reward.double(), group, **options, backend="reference")
    assert got.dtype == dtype
    # In f64 only the order of sums differs, of numbers near 1000.
    torch.testing.assert_close(got.double(), truth, rtol=1e-7, atol=1e-7 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("baseline", [Baseline.MEAN, Baseline.LEAVE_ONE_OUT])
@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_lone_rollouts_have_exactly_no_advantage(baseline, scale, dtype):
    # The rounded mean of three times 0.1 in f64 is more than 0.1.
    reward = torch.tensor([0.1] * 3 + [0.1] * 7 + [0.7] * 10 + [0.3], dtype=dtype)
    group = torch.tensor([0] * 3 + [1] * 7 + [2] * 10 + [3])
    assert not group_advantage(reward, group, baseline=baseline, scale=scale, backend="triton").any()


def test_a_group_s_bits_do_not_depend_on_the_other_groups():
    reward, group = inputs(40, 3)
    whole = kernel.forward(reward, group, 1, 1, 1, 1e-4, tile=(8, 1))
    for g in group.unique():
        mine = group == g
        assert torch.equal(kernel.forward(reward[mine], group[mine], 1, 1, 1, 1e-4, tile=(8, 1)), whole[mine])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", kernel.TILES)
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (1024, 128), (16384, 1024), (16383, 1)])
def test_on_a_gpu_a_step_s_rewards_agree_with_float64_repeat_and_ignore_other_groups(size, groups, tile, dtype):
    reward, group = inputs(size, groups, dtype=dtype, device="cuda")
    for baseline, scale in ((0, 1), (1, 0), (1, 1), (2, 2)):
        got = kernel.forward(reward, group, baseline, scale, 1, 1e-4, tile=tile)
        assert torch.equal(got, kernel.forward(reward, group, baseline, scale, 1, 1e-4, tile=tile))
        options = {"baseline": Baseline(baseline), "scale": Scale(scale)}
        truth = group_advantage(reward.double().cpu(), group.cpu(), **options, backend="reference")
        torch.testing.assert_close(got.double().cpu(), truth, rtol=2e-7, atol=2e-7 if dtype == torch.float32 else 1e-9)
        if scale != 2:
            mine = group == group[-1]
            assert torch.equal(
                kernel.forward(reward[mine], group[mine], baseline, scale, 1, 1e-4, tile=tile), got[mine]
            )
