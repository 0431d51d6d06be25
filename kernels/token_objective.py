"""The clipped policy objective of `fastrl.ops.token_objective` in one pass over [T].

Every column is read once and every output written once. With r = exp(clamp(l - l_old)):

    surrogate = max(-min(r, delta) A, -clip(r, 1 - low, 1 + high) A),  at most -dual_clip A where A < 0
    loss      = correction surrogate + kl_coef kl(l - l_ref) - entropy_coef H

The derivative by l is written beside it. The estimator k3 of the KL is summed as a series near 0, where
exp(-d) + d - 1 would lose all its digits.
"""

from __future__ import annotations

from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = ((1024, 4), (512, 4), (2048, 8))  # tokens and warps per program; the first is the default
TILE_FLOAT64 = (256, 8)  # a wider one spills
# A product and a sum are rounded one after the other, as PyTorch does.
ROUNDING = {"enable_fp_fusion": False}
INFINITY = tl.constexpr(inf)


def forward(
    logprob: Tensor,
    old_logprob: Tensor,
    ref_logprob: Tensor | None,
    advantage: Tensor,
    sampler_logprob: Tensor | None,
    entropy: Tensor | None,
    weight: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    delta: float,
    kl: int,
    kl_gradient: int,
    kl_coef: float,
    correction_cap: float,
    correction_low: float,
    correction_high: float,
    entropy_coef: float,
    log_ratio_clamp: float,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Seven [T] columns of any floating type -> loss, d_logprob, ratio, kl in f32 (f64 for f64 logprob) and four bools.

    The bools are clipped_low, clipped_high, dual_clipped, nonfinite; see `fastrl.ops.TokenObjective`.
    """
    columns = (logprob, old_logprob, ref_logprob, advantage, sampler_logprob, entropy, weight)
    assert all(x is None or (x.is_contiguous() and x.shape == logprob.shape) for x in columns)
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    numbers = [torch.empty(logprob.shape, dtype=dtype, device=logprob.device) for _ in range(4)]
    facts = [torch.empty(logprob.shape, dtype=torch.bool, device=logprob.device) for _ in range(4)]
    block, num_warps = tile or (TILE_FLOAT64 if dtype == torch.float64 else TILES[0])
    if logprob.numel():
        with torch.cuda.device_of(logprob):
            _objective[(triton.cdiv(logprob.numel(), block),)](
                *columns,
                *numbers,
                *facts,
                logprob.numel(),
                kl_coef,
                entropy_coef,
                CLIP_LOW=clip_low,
                CLIP_HIGH=clip_high,
                DUAL_CLIP=dual_clip,
                DELTA=delta,
                KL=kl,
                KL_GRADIENT=kl_gradient,
                CORRECTION_CAP=correction_cap,
                CORRECTION_LOW=correction_low,
                CORRECTION_HIGH=correction_high,
                CLAMP=log_ratio_clamp,
                BLOCK=block,
                num_warps=num_warps,
                **ROUNDING,
            )
    loss, d_logprob, ratio, value = numbers
    low, high, dual, nonfinite = facts
    return loss, d_logprob, ratio, value, low, high, dual, nonfinite


@triton.jit
def _objective(
    logprob_ptr,
    old_ptr,
    ref_ptr,
    advantage_ptr,
    sampler_ptr,
    entropy_ptr,
    weight_ptr,
    loss_ptr,
    d_logprob_ptr,
    ratio_ptr,
    kl_ptr,
    low_ptr,
    high_ptr,
    dual_ptr,
    nonfinite_ptr,
    T,
    kl_coef: tl.float64,  # not constexpr: a controller may change it every step
    entropy_coef: tl.float64,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    DELTA: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    CORRECTION_CAP: tl.constexpr,
    CORRECTION_LOW: tl.constexpr,
    CORRECTION_HIGH: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK tokens; ref_ptr, sampler_ptr and entropy_ptr may be None."""
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    trained = tl.load(weight_ptr + token, mask=inside, other=0) != 0

    raw_logprob = tl.load(logprob_ptr + token, mask=inside, other=0.0)
    raw_old = tl.load(old_ptr + token, mask=inside, other=0.0)
    raw_advantage = tl.load(advantage_ptr + token, mask=inside, other=0.0)
    finite = _is_finite(raw_logprob) & _is_finite(raw_old) & _is_finite(raw_advantage)
    if ref_ptr is not None:
        raw_ref = tl.load(ref_ptr + token, mask=inside, other=0.0)
        finite &= _is_finite(raw_ref)
    if sampler_ptr is not None:
        raw_sampler = tl.load(sampler_ptr + token, mask=inside, other=0.0)
        finite &= _is_finite(raw_sampler)
    if entropy_ptr is not None:
        raw_entropy = tl.load(entropy_ptr + token, mask=inside, other=0.0)
        finite &= _is_finite(raw_entropy)
    used = trained & finite

    # Numbers of tokens that are not used become 0 before any arithmetic.
    logprob = tl.where(used, raw_logprob.to(dtype), 0.0)
    old = tl.where(used, raw_old.to(dtype), 0.0)
    advantage = tl.where(used, raw_advantage.to(dtype), 0.0)

    log_ratio = logprob - old
    ratio = tl.exp(_held(log_ratio, -CLAMP, CLAMP))
    bounded = _held(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH)
    capped = _held(ratio, 0.0, DELTA)
    unclipped = -capped * advantage
    clipped = -bounded * advantage
    loss = tl.maximum(unclipped, clipped)
    moves = tl.where(unclipped >= clipped, capped == ratio, bounded == ratio)
    moves &= _held(log_ratio, -CLAMP, CLAMP) == log_ratio
    most = tl.full((BLOCK,), DUAL_CLIP, dtype)
    if INFINITY > DUAL_CLIP:  # else inf times an advantage of 0
        held = -most * advantage
        binds = (advantage < 0) & (loss > held)
        loss = tl.where(binds, held, loss)
        moves = moves & (binds == 0)
    derivative = tl.where(moves, -ratio * advantage, 0.0)
    if sampler_ptr is not None:
        sampler = tl.where(used, raw_sampler.to(dtype), 0.0)
        rho = tl.exp(_held(old - sampler, -CLAMP, CLAMP))
        kept = _held(rho, CORRECTION_LOW, CORRECTION_HIGH) == rho
        correction = tl.where(kept, _held(rho, 0.0, CORRECTION_CAP), 0.0)
        loss *= correction
        derivative *= correction
    kl = tl.zeros_like(loss)
    if ref_ptr is not None:
        difference = logprob - tl.where(used, raw_ref.to(dtype), 0.0)
        d = _held(difference, -CLAMP, CLAMP)
        kl = _kl(d, KL)
        slope = tl.where(d == difference, _kl_slope(d, KL_GRADIENT), 0.0)
        loss += (kl_coef * kl).to(dtype)
        derivative += (kl_coef * slope).to(dtype)
    if entropy_ptr is not None:
        loss -= (entropy_coef * tl.where(used, raw_entropy.to(dtype), 0.0)).to(dtype)

    tl.store(loss_ptr + token, tl.where(used, loss, 0.0), mask=inside)
    tl.store(d_logprob_ptr + token, tl.where(used, derivative, 0.0), mask=inside)
    tl.store(ratio_ptr + token, tl.where(used, ratio, 0.0), mask=inside)
    tl.store(kl_ptr + token, tl.where(used, kl, 0.0), mask=inside)
    # advantage is 0 on tokens that are not used: the facts are False there.
    floor = tl.full((BLOCK,), 1 - CLIP_LOW, dtype)
    ceiling = tl.full((BLOCK,), 1 + CLIP_HIGH, dtype)
    tl.store(low_ptr + token, (advantage < 0) & (ratio < floor), mask=inside)
    tl.store(high_ptr + token, (advantage > 0) & (ratio > ceiling), mask=inside)
    tl.store(dual_ptr + token, (advantage < 0) & (tl.maximum(capped, bounded) > most), mask=inside)
    tl.store(nonfinite_ptr + token, trained & (finite == 0), mask=inside)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < INFINITY  # False for NaN


@triton.jit
def _held(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x inside [LOW, HIGH]; the bounds in x's own type, where a bare f64 bound would be rounded to f32."""
    low = tl.full(x.shape, LOW, x.dtype)
    high = tl.full(x.shape, HIGH, x.dtype)
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _kl(d, KL: tl.constexpr):
    """Estimator 1, 2 or 3 of the KL from d = l - l_ref."""
    if KL == 1:
        return d
    if KL == 2:
        return d * d / 2
    return _exp_past_linear(-d)


@triton.jit
def _kl_slope(d, KL: tl.constexpr):
    """Derivative of the estimator by l."""
    if KL == 1:
        return tl.full(d.shape, 1.0, d.dtype)
    if KL == 2:
        return d
    return d - _exp_past_linear(-d)  # 1 - exp(-d)


@triton.jit
def _exp_past_linear(x):
    """exp(x) - 1 - x, by its series x^2/2 (1 + x/3 (1 + x/4 (...))) where |x| < 1."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(19, 2, -1):  # the first term left out is below 1e-17 of the sum
        series = 1 + series * x / k
    return tl.where(tl.abs(x) < 1, x * x / 2 * series, tl.exp(x) - 1 - x)


def _audited(logprob: str, result: str, tile: tuple[int, int], *, all_columns: bool) -> dict:
    """What one launch compiles; the numbers of the options change no instruction worth counting."""
    present = f"*{result}" if all_columns else "constexpr"
    block, num_warps = tile
    options = {"CLIP_LOW": 0.2, "CLIP_HIGH": 0.28, "DUAL_CLIP": 3.0 if all_columns else inf, "DELTA": inf}
    options |= {"KL": 3, "KL_GRADIENT": 2, "CLAMP": 20.0, "BLOCK": block}
    options |= {"CORRECTION_CAP": 2.0, "CORRECTION_LOW": 0.0, "CORRECTION_HIGH": inf}
    optional = ("ref_ptr", "sampler_ptr", "entropy_ptr")
    signature = {"logprob_ptr": f"*{logprob}", "old_ptr": f"*{result}", "ref_ptr": present}
    signature |= {"advantage_ptr": f"*{result}", "sampler_ptr": present, "entropy_ptr": present, "weight_ptr": "*fp32"}
    signature |= {f"{name}_ptr": f"*{result}" for name in ("loss", "d_logprob", "ratio", "kl")}
    signature |= {f"{name}_ptr": "*i1" for name in ("low", "high", "dual", "nonfinite")}
    signature |= {"T": "i32", "kl_coef": "fp64", "entropy_coef": "fp64"} | dict.fromkeys(options, "constexpr")
    return {
        "kernel": _objective,
        "signature": signature,
        "constexprs": options if all_columns else options | dict.fromkeys(optional),
        "num_warps": num_warps,
        "num_stages": 3,
        "options": ROUNDING,
    }


AUDIT = (
    *(
        _audited(logprob, "fp32", tile, all_columns=all_columns)
        for tile in TILES
        for logprob, all_columns in (("fp32", True), ("fp32", False), ("bf16", True))
    ),
    _audited("fp64", "fp64", TILE_FLOAT64, all_columns=True),
)
