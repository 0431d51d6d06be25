"""Advantages of rollouts that answer the same prompt: reward minus a baseline, over a spread, per ragged group."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_shapes

IMPLEMENTATIONS = Implementations(
    op="group_advantage", triton="fastrl.kernels.group_advantage", native="fastrl::group_advantage"
)


class Baseline(IntEnum):
    """What is subtracted from a reward; a number because compiled code reads it."""

    NONE = 0
    MEAN = 1  # of the group
    LEAVE_ONE_OUT = 2  # mean of the group's other rewards


class Scale(IntEnum):
    """What the difference is divided by (plus eps); a number because compiled code reads it."""

    NONE = 0
    GROUP = 1  # standard deviation of the group's rewards
    BATCH = 2  # standard deviation of all rewards


def group_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    baseline: Baseline = Baseline.MEAN,
    scale: Scale = Scale.GROUP,
    ddof: int = 1,
    eps: float = 1e-4,
    backend: str | None = None,
) -> Tensor:
    """Advantage of each sequence within its group; groups may have any size and lie in any order.

        A[s] = (r[s] - baseline) / (std + eps),    std^2 = sum (r - mean)^2 / (n - ddof)

    Presets: GRPO is the default, Dr. GRPO `scale=NONE`, RLOO `LEAVE_ONE_OUT` with `scale=NONE`, REINFORCE++ one
    group for the whole batch (`group = zeros`), its baseline variant `scale=BATCH`.

    Exact zeros: rewards that are all equal, or a group of one, have A = 0 whenever there is a baseline, and a
    spread of exactly 0 (or n <= ddof) gives 0 instead of r / eps. Equality is compared, not inferred from the mean.

    Args:
        reward: [S] in units of reward, f32 or f64; a constant. A reward that is not finite (NaN marks a rollout
            that could not be judged) gets A = 0 and leaves every mean and deviation.
        group: [S] int64, the same number for rollouts of the same prompt; numbers need not be dense or sorted.
        baseline: `Baseline`; leave-one-out is `n / (n - 1) (r - mean)`.
        scale: `Scale`.
        ddof: 1 for the sample deviation (TRL, verl), 0 for the population's.
        eps: added to the deviation: 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF.
        backend: see `fastrl.ops.backend.choose`.

    Returns:
        [S] advantage, of reward's type, without gradient; means and deviations are taken in f64, in two passes.

    Raises:
        ValueError: shapes or types that do not fit, or ddof or eps below 0.

    Cost: O(S log S) for the ragged grouping; no loop over groups. On a GPU torch makes one host sync, for
    the number of groups; triton none, and its sums are the same in every run.

    Source: Shao 2024, arXiv:2402.03300, sec. 4.1 (GRPO); Liu 2025, arXiv:2503.20783 (Dr. GRPO);
    Kool 2019 and Ahmadian 2024, arXiv:2402.14740, eq. 9 (leave-one-out); Hu 2025, arXiv:2501.03262 (REINFORCE++).
    """
    check_shapes("reward[S] group[S]", {"reward": reward, "group": group})
    if reward.dtype not in (torch.float32, torch.float64) or group.dtype != torch.int64:
        raise ValueError(f"group_advantage needs float32 or float64 and int64, got {reward.dtype} and {group.dtype}")
    if ddof < 0 or not eps >= 0:
        raise ValueError(f"group_advantage needs ddof >= 0 and eps >= 0, got {ddof} and {eps}")
    chosen = choose(backend, reward, IMPLEMENTATIONS)
    if chosen == "native":
        advantage: Tensor = torch.ops.fastrl.group_advantage(
            reward.detach().contiguous(), group.contiguous(), int(baseline), int(scale), ddof, eps
        )
        return advantage
    if chosen == "triton":
        from fastrl.kernels import group_advantage as kernel

        numbers = (int(baseline), int(scale), ddof, eps)
        return kernel.forward(reward.detach().contiguous(), group.contiguous(), *numbers)
    function = reference if chosen == "reference" else _segmented
    return function(reward.detach(), group, Baseline(baseline), Scale(scale), ddof, eps)


def reference(reward: Tensor, group: Tensor, baseline: Baseline, scale: Scale, ddof: int, eps: float) -> Tensor:
    """Group by group."""
    advantage = torch.zeros_like(reward, dtype=torch.float64)
    judged = reward.isfinite()
    batch_std = _std(reward[judged].double(), ddof)
    for g in group.unique():
        members = judged & (group == g)
        r = reward[members].double()
        if r.numel() == 0:
            continue
        centred = r
        if baseline != Baseline.NONE:
            all_equal = r.max() == r.min()
            centred = torch.zeros_like(r) if all_equal else r - r.mean()
        if baseline == Baseline.LEAVE_ONE_OUT:
            centred = centred * (r.numel() / max(r.numel() - 1, 1))
        if scale != Scale.NONE:
            std = _std(r, ddof) if scale == Scale.GROUP else batch_std
            centred = centred / (std + eps) if std > 0 else torch.zeros_like(r)
        advantage[members] = centred
    return advantage.to(reward.dtype)


def _std(r: Tensor, ddof: int) -> Tensor:
    """Standard deviation; exactly 0 for equal values and where there are too few of them."""
    if r.numel() <= ddof or r.max() == r.min():
        return r.new_zeros(())
    return ((r - r.mean()).square().sum() / (r.numel() - ddof)).sqrt()


def _segmented(reward: Tensor, group: Tensor, baseline: Baseline, scale: Scale, ddof: int, eps: float) -> Tensor:
    """All groups at once, by scatter."""
    judged = reward.isfinite()
    r = torch.where(judged, reward, 0.0).double()
    segment = group.unique(return_inverse=True)[1]
    centred, std = _centred_and_std(r, judged, segment, ddof)
    if scale == Scale.BATCH:
        std = _centred_and_std(r, judged, torch.zeros_like(segment), ddof)[1]
    advantage = r if baseline == Baseline.NONE else centred
    if baseline == Baseline.LEAVE_ONE_OUT:
        count = _sums(judged.double(), segment)
        advantage = advantage * (count / (count - 1).clamp(min=1))[segment]
    if scale != Scale.NONE:
        advantage = torch.where(std > 0, advantage / (std + eps), 0.0)
    return torch.where(judged, advantage, 0.0).to(reward.dtype)


def _centred_and_std(r: Tensor, judged: Tensor, segment: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """[S] r minus its segment's mean, and [S] the deviation of its segment; both exactly 0 where all are equal."""
    count = _sums(judged.double(), segment)
    highest = _extreme(torch.where(judged, r, -torch.inf), segment, "amax")
    lowest = _extreme(torch.where(judged, r, torch.inf), segment, "amin")
    varies = judged & (highest > lowest)[segment]
    mean = _sums(r, segment) / count.clamp(min=1)
    centred = torch.where(varies, r - mean[segment], 0.0)
    variance = _sums(centred.square(), segment) / (count - ddof).clamp(min=1)
    variance = torch.where(count > ddof, variance, 0.0)
    return centred, variance.sqrt()[segment]


def _sums(x: Tensor, segment: Tensor) -> Tensor:
    """[S] sum per segment; a segment's number is below S."""
    return torch.zeros_like(x).index_add_(0, segment, x)


def _extreme(x: Tensor, segment: Tensor, reduce: str) -> Tensor:
    """[S] largest or smallest per segment."""
    return torch.zeros_like(x).scatter_reduce_(0, segment, x, reduce, include_self=False)
