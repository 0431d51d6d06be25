"""Advantages within ragged groups, deterministic: rollouts are sorted by group, one program reduces one group.

    A[s] = (r[s] - baseline) / (std + eps),    std^2 = sum (r - mean)^2 / (n - ddof)

Means and deviations are taken in f64, in two passes, without atomics. The order of sums depends on the group's own
rollouts alone. No host sync: there is one program per rollout, and those that do not begin a group return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = ((256, 4), (128, 1), (64, 1))  # rollouts and warps per program; the first is the default
# A product and a sum are rounded one after the other, as PyTorch does.
ROUNDING = {"enable_fp_fusion": False}


def forward(
    reward: Tensor,
    group: Tensor,
    baseline: int,
    scale: int,
    ddof: int,
    eps: float,
    *,
    tile: tuple[int, int] = TILES[0],
) -> Tensor:
    """reward [S] f32 or f64, group [S] int64 -> advantage [S] of reward's type.

    baseline: 0 none, 1 mean, 2 mean of the others. scale: 0 none, 1 the group's deviation, 2 that of all rewards.
    """
    assert reward.is_contiguous()
    assert reward.shape == group.shape
    assert group.dtype == torch.int64
    advantage = torch.empty_like(reward)
    if not reward.numel():
        return advantage
    # Stable, so that a group's rollouts are summed in the order they came in.
    in_order, order = group.sort(stable=True)
    batch_std = torch.empty(1, dtype=torch.float64, device=reward.device)
    block, num_warps = tile
    with torch.cuda.device_of(reward):
        if scale == 2:
            _batch_deviation[(1,)](
                reward, order, batch_std, reward.numel(), DDOF=ddof, BLOCK=block, num_warps=num_warps, **ROUNDING
            )
        _one_group[(reward.numel(),)](
            reward,
            in_order,
            order,
            batch_std,
            advantage,
            reward.numel(),
            BASELINE=baseline,
            SCALE=scale,
            DDOF=ddof,
            EPS=eps,
            BLOCK=block,
            num_warps=num_warps,
            **ROUNDING,
        )
    return advantage


@triton.jit
def _batch_deviation(reward_ptr, order_ptr, std_ptr, S, DDOF: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the deviation of all rewards."""
    first = tl.zeros((), tl.int64)
    _, _, _, std = _moments(reward_ptr, order_ptr, first, first + S, DDOF, BLOCK)
    tl.store(std_ptr, std)


@triton.jit
def _one_group(
    reward_ptr,
    group_ptr,
    order_ptr,
    batch_std_ptr,
    advantage_ptr,
    S,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    DDOF: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per place in sorted order; the first place of a group does its work."""
    dtype: tl.constexpr = advantage_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64)
    mine = tl.load(group_ptr + first)
    before = tl.load(group_ptr + first - 1, mask=first > 0, other=0)
    if (first > 0) & (before == mine):
        return
    end = _end(group_ptr, first, mine, S, BLOCK)
    count, mean, varies, std = _moments(reward_ptr, order_ptr, first, end, DDOF, BLOCK)
    if SCALE == 2:
        std = tl.load(batch_std_ptr)
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = place < end
        rollout = tl.load(order_ptr + place, mask=inside, other=0)
        raw = tl.load(reward_ptr + rollout, mask=inside, other=0.0)
        judged = tl.abs(raw) < float("inf")
        advantage = tl.where(judged, raw.to(tl.float64), 0.0)
        if BASELINE != 0:
            advantage = tl.where(judged, tl.where(varies, advantage - mean, 0.0), 0.0)
        if BASELINE == 2:
            advantage *= count / tl.where(count > 1, count - 1, 1.0)
        if SCALE != 0:
            divisor = tl.where(std > 0, std, 1.0) + tl.full((), EPS, tl.float64)
            advantage = tl.where(std > 0, advantage / divisor, 0.0)
        tl.store(advantage_ptr + rollout, advantage.to(dtype), mask=inside)


@triton.jit
def _end(group_ptr, first, mine, S, BLOCK: tl.constexpr):
    """The place after the last rollout of the group that begins at `first`."""
    end = first
    found = BLOCK
    while found == BLOCK:
        place = end + tl.arange(0, BLOCK)
        same = (place < S) & (tl.load(group_ptr + place, mask=place < S, other=0) == mine)
        found = tl.sum(same.to(tl.int32))
        end += found
    return end


@triton.jit
def _moments(reward_ptr, order_ptr, first, end, DDOF: tl.constexpr, BLOCK: tl.constexpr):
    """Count, mean, whether any two differ, and deviation of the finite rewards at [first, end) of the sorted order."""
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    highest = tl.full((), float("-inf"), tl.float64)
    lowest = tl.full((), float("inf"), tl.float64)
    for start in range(first, end, BLOCK):
        r, judged = _rewards(reward_ptr, order_ptr, start, end, BLOCK)
        total += tl.sum(r)
        count += tl.sum(judged.to(tl.float64))
        highest = tl.maximum(highest, tl.max(tl.where(judged, r, float("-inf"))))
        lowest = tl.minimum(lowest, tl.min(tl.where(judged, r, float("inf"))))
    mean = total / tl.where(count > 0, count, 1.0)
    varies = highest > lowest  # compared, not inferred from the rounded mean
    squares = tl.zeros((), tl.float64)
    for start in range(first, end, BLOCK):
        r, judged = _rewards(reward_ptr, order_ptr, start, end, BLOCK)
        centred = tl.where(judged, r - mean, 0.0)
        squares += tl.sum(centred * centred)
    deviation = tl.sqrt(squares / tl.where(count > DDOF, count - DDOF, 1.0))
    std = tl.where(varies, tl.where(count > DDOF, deviation, 0.0), 0.0)
    return count, mean, varies, std


@triton.jit
def _rewards(reward_ptr, order_ptr, start, end, BLOCK: tl.constexpr):
    """[BLOCK] rewards in f64, 0 where not finite or outside, and which are finite."""
    place = start + tl.arange(0, BLOCK).to(tl.int64)
    inside = place < end
    rollout = tl.load(order_ptr + place, mask=inside, other=0)
    raw = tl.load(reward_ptr + rollout, mask=inside, other=float("nan"))
    judged = tl.abs(raw) < float("inf")
    return tl.where(judged, raw.to(tl.float64), 0.0), judged


def _audited(kernel, number: str, tile: tuple[int, int], **constexprs: float) -> dict:
    pointers = {"group_ptr": "*i64", "order_ptr": "*i64", "batch_std_ptr": "*fp64", "std_ptr": "*fp64", "S": "i32"}
    constexprs["BLOCK"] = tile[0]
    return {
        "kernel": kernel,
        "signature": {
            name: "constexpr" if name in constexprs else pointers.get(name, f"*{number}") for name in kernel.arg_names
        },
        "constexprs": constexprs,
        "num_warps": tile[1],
        "num_stages": 3,
        "options": ROUNDING,
    }


AUDIT = tuple(
    entry
    for number in ("fp32", "fp64")
    for tile in TILES
    for entry in (
        _audited(_one_group, number, tile, BASELINE=1, SCALE=1, DDOF=1, EPS=1e-4),
        _audited(_one_group, number, tile, BASELINE=2, SCALE=2, DDOF=0, EPS=0.0),
        _audited(_batch_deviation, number, tile, DDOF=1),
    )
)
