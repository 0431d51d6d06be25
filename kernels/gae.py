"""Generalised advantage estimation over packed sequences in one pass, both conventions of `fastrl.ops.gae`.

With Y[u] = gamma V[u] + gamma lam A[u], what a step passes to the one before it, the recurrence is one affine map:

    A[t] = r[t] - V[t] + Y[u(t)],    Y[t] = gamma V[t] + gamma lam (r[t] - V[t]) + gamma lam Y[u(t)]

A token that is not trained passes Y on unchanged (skip), or times gamma lam (a step with reward and value 0).
One program per sequence, as in `reverse_scan`; sums in f64, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels.reverse_scan import LAUNCHED, ROUNDING, TILES, _after, fitted


def forward(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    trained: Tensor,
    gamma: float,
    lam: float,
    skip: bool,
    *,
    tile: tuple[int, int] = TILES[0],
) -> tuple[Tensor, Tensor]:
    """reward, value [T] f32 or f64, cu_seqlens [S + 1], trained [T] bool -> advantage, returns [T]."""
    assert all(x.is_contiguous() for x in (reward, value, cu_seqlens, trained))
    assert reward.dtype == value.dtype
    advantage, returns = torch.empty_like(reward), torch.empty_like(reward)
    block, num_warps = fitted(tile, reward.numel())
    if reward.numel():
        with torch.cuda.device_of(reward):
            _gae[(cu_seqlens.numel() - 1,)](
                reward,
                value,
                cu_seqlens,
                trained,
                advantage,
                returns,
                GAMMA=gamma,
                LAM=lam,
                SKIP=skip,
                BLOCK=block,
                num_warps=num_warps,
                **ROUNDING,
            )
    return advantage, returns


@triton.jit
def _gae(
    reward_ptr,
    value_ptr,
    cu_seqlens_ptr,
    trained_ptr,
    advantage_ptr,
    returns_ptr,
    GAMMA: tl.constexpr,
    LAM: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence; lane t scans the map of token t + 1, so that it ends with Y[u(t)]."""
    dtype: tl.constexpr = advantage_ptr.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    gamma = tl.full((), GAMMA, tl.float64)
    decay = gamma * tl.full((), LAM, tl.float64)
    carried = tl.zeros((), tl.float64)
    for done in range(0, end - start, BLOCK):
        token = end - done - BLOCK + lane
        inside = token >= start
        has_next = inside & (token + 1 < end)
        next_trained = tl.load(trained_ptr + token + 1, mask=has_next, other=0) != 0
        next_reward = tl.load(reward_ptr + token + 1, mask=has_next & next_trained, other=0.0).to(tl.float64)
        next_value = tl.load(value_ptr + token + 1, mask=has_next & next_trained, other=0.0).to(tl.float64)
        b = gamma * next_value + decay * (next_reward - next_value)
        a = decay + tl.zeros((BLOCK,), tl.float64)
        if SKIP:
            a = tl.where(next_trained, a, 1.0)
        a, b = tl.associative_scan((a, b), 0, _after, reverse=True)
        passed = b + a * carried  # Y[u(t)]

        trained = tl.load(trained_ptr + token, mask=inside, other=0) != 0
        reward = tl.load(reward_ptr + token, mask=inside & trained, other=0.0).to(tl.float64)
        value = tl.load(value_ptr + token, mask=inside & trained, other=0.0).to(tl.float64)
        advantage = reward - value + passed
        returns = reward + passed
        tl.store(advantage_ptr + token, tl.where(trained, advantage, 0.0).to(dtype), mask=inside)
        tl.store(returns_ptr + token, tl.where(trained, returns, 0.0).to(dtype), mask=inside)
        carried = tl.sum(tl.where(lane == 0, passed, 0.0))


def _audited(number: str, index: str, tile: tuple[int, int], *, skip: bool) -> dict:
    signature = {f"{name}_ptr": f"*{number}" for name in ("reward", "value", "advantage", "returns")}
    signature |= {"cu_seqlens_ptr": f"*{index}", "trained_ptr": "*i1"}
    constexprs = {"GAMMA": 0.99, "LAM": 0.95, "SKIP": skip, "BLOCK": tile[0]}
    return {
        "kernel": _gae,
        "signature": {name: signature.get(name, "constexpr") for name in _gae.arg_names},
        "constexprs": constexprs,
        "num_warps": tile[1],
        "num_stages": 3,
        "options": ROUNDING,
    }


AUDIT = tuple(
    _audited(number, index, tile, skip=skip)
    for number in ("fp32", "fp64")
    for skip in (True, False)
    for index, tile in LAUNCHED
)
