"""The clipped policy objective of one token and its derivative, in one pass over [T].

loss = correction * max(-min(r, delta) A, -clip(r, 1 - low, 1 + high) A) + kl_coef kl - entropy_coef H
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_shapes
from fastrl.ops.first_order import first_order

IMPLEMENTATIONS = Implementations(op="token_objective", triton="fastrl.kernels.token_objective")


class Kl(IntEnum):
    """Estimator of KL(policy || reference) from one token, d = l - l_ref (Schulman 2020, "Approximating KL").

    A number, because compiled code reads it.
    """

    K1 = 1  # d
    K2 = 2  # d^2 / 2
    K3 = 3  # exp(-d) + d - 1


class TokenObjective(NamedTuple):
    """Every field is [T]; only `loss` carries a gradient. Tokens that are not used are 0 or False everywhere."""

    loss: Tensor  # per token, unweighted
    d_logprob: Tensor  # d loss / d logprob; d loss / d entropy is -entropy_coef on used tokens
    ratio: Tensor  # r = exp(logprob - old_logprob)
    kl: Tensor  # the estimator `kl`; 0 without ref_logprob
    clipped_low: Tensor  # bool: A < 0 and r below 1 - clip_low
    clipped_high: Tensor  # bool: A > 0 and r above 1 + clip_high
    dual_clipped: Tensor  # bool: A < 0 and the loss was held at -dual_clip A
    nonfinite: Tensor  # bool: has a weight, but an input was not finite; left out


@dataclass(frozen=True, slots=True)
class _Options:
    """The numbers of one call; see `token_objective`."""

    clip_low: float
    clip_high: float
    dual_clip: float  # inf: off
    delta: float  # inf: off
    kl: Kl
    kl_gradient: Kl
    kl_coef: float
    correction_cap: float
    correction_low: float
    correction_high: float
    entropy_coef: float
    log_ratio_clamp: float


class _Inputs(NamedTuple):
    """[T] each, f32 or f64; zeros on tokens that are not used."""

    logprob: Tensor
    old_logprob: Tensor
    ref_logprob: Tensor | None
    advantage: Tensor
    sampler_logprob: Tensor | None
    entropy: Tensor | None


def token_objective(
    logprob: Tensor,
    old_logprob: Tensor,
    ref_logprob: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    kl_coef: float = 0.0,
    kl: Kl = Kl.K3,
    kl_gradient: Kl | None = None,
    sampler_logprob: Tensor | None = None,
    correction_cap: float = 2.0,
    correction_low: float = 0.0,
    correction_high: float = inf,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    log_ratio_clamp: float = 20.0,
    backend: str | None = None,
) -> TokenObjective:
    """PPO's surrogate with the usual additions, per token, with its closed-form derivative.

        surrogate = max(-min(r, delta) A, -clip(r, 1 - clip_low, 1 + clip_high) A),    r = exp(l - l_old)
        surrogate = min(surrogate, -dual_clip A)                              where A < 0
        rho       = exp(l_old - l_mu);  correction = min(rho, cap) if low <= rho <= high else 0
        loss      = correction surrogate + kl_coef kl(l - l_ref) - entropy_coef H

    Truncated importance sampling is `correction_cap`; icepop's mask is `correction_low`, `correction_high` with
    `correction_cap=inf`. A correction per sequence, being a constant factor >= 0 of the surrogate alone, is
    multiplied into `advantage` by the caller: the surrogate is proportional to A.

    Args:
        logprob: [T] l, of the taken token under the policy being trained, nats; differentiable.
        old_logprob: [T] l_old under the policy that defines the ratio; a constant. With one update per batch it is
            `logprob.detach()`.
        ref_logprob: [T] l_ref under the frozen reference, or None; a constant.
        advantage: [T] A, a constant.
        weight: [T] 0 leaves the token out, whatever its numbers; no other use: the caller averages.
        clip_low: how far r may fall below 1 (A < 0).
        clip_high: how far r may rise above 1 (A > 0); more than clip_low is DAPO's clip-higher.
        dual_clip: c > 1; for A < 0 the loss is at most -c A. None: off. verl's default is 3.
        delta: cap on r before the minimum (TRL); bounds the loss at A < 0. None: off.
        kl_coef: beta; needs ref_logprob when not 0.
        kl: estimator for the value.
        kl_gradient: estimator whose derivative is used; None means `kl`. `Kl.K2` is the
            unbiased gradient of the reverse KL on policy, whatever the value shown (straight through).
        sampler_logprob: [T] l_mu under the distribution that sampled, or None (correction 1); a constant.
        correction_cap: rho counts for at most this.
        correction_low: tokens with rho below it lose their surrogate.
        correction_high: tokens with rho above it lose their surrogate.
        entropy: [T] H of the policy at each position, nats; differentiable; None when entropy_coef is 0.
        entropy_coef: bonus per nat.
        log_ratio_clamp: every difference of log-probabilities is held in +-this (verl's 20), with gradient 0
            outside; at most 80, so that exp stays finite in f32.
        backend: see `fastrl.ops.backend.choose`.

    Returns:
        `TokenObjective`, in f32 (f64 for f64 logprob). A token with any input that is not finite has loss and
        gradient 0 and is marked in `nonfinite`.

    Gradient: d loss / d logprob is `d_logprob`; where the two terms of the maximum are equal the unclipped one's.

    Raises:
        ValueError: shapes that do not fit, a coefficient whose tensor is missing, a number out of its range.

    Cost: elementwise over [T], no host sync; d_logprob is what backward keeps. Triton reads each column once.

    Source: Schulman 2017, arXiv:1707.06347, eq. 7; Ye 2020, arXiv:1912.09729, eq. 5 (dual clip); Yu 2025,
    arXiv:2503.14476, eq. 10 (clip-higher); INTELLECT-2, arXiv:2505.07291, sec. 3.4 (delta).
    """
    inputs = _Inputs(logprob, old_logprob, ref_logprob, advantage, sampler_logprob, entropy)
    options = _Options(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=inf if dual_clip is None else dual_clip,
        delta=inf if delta is None else delta,
        kl=Kl(kl),
        kl_gradient=Kl(kl if kl_gradient is None else kl_gradient),
        kl_coef=kl_coef,
        correction_cap=correction_cap,
        correction_low=correction_low,
        correction_high=correction_high,
        entropy_coef=entropy_coef,
        log_ratio_clamp=log_ratio_clamp,
    )
    _check(inputs, weight, options)
    chosen = choose(backend, logprob, IMPLEMENTATIONS)
    if chosen == "triton":
        return TokenObjective(*_Fused.apply(*inputs, weight, options))
    present = [x for x in inputs if x is not None]
    finite = torch.stack([x.detach().isfinite() for x in present]).all(0)
    trained = weight != 0
    used = trained & finite
    dtype = torch.promote_types(logprob.dtype, torch.float32)

    def clean(x: Tensor) -> Tensor:
        # Replaced before any arithmetic, so that no NaN meets a zero on its way back.
        return torch.where(used, x.to(dtype), 0.0)

    inputs = _Inputs(
        logprob=clean(logprob),
        old_logprob=clean(old_logprob.detach()),
        ref_logprob=None if ref_logprob is None else clean(ref_logprob.detach()),
        advantage=clean(advantage.detach()),
        sampler_logprob=None if sampler_logprob is None else clean(sampler_logprob.detach()),
        entropy=None if entropy is None else clean(entropy),
    )
    if chosen == "reference":
        loss, d_logprob = reference(inputs, options), _reference_derivative(inputs, options)
    else:
        loss, d_logprob = _ClosedForm.apply(*inputs, options)
    return _with_metrics(inputs, options, loss, d_logprob, used, trained & ~finite)


def _check(inputs: _Inputs, weight: Tensor, options: _Options) -> None:
    columns = inputs._asdict() | {"weight": weight}
    check_shapes(" ".join(f"{name}[T]" for name in columns), columns)
    if options.kl_coef != 0 and inputs.ref_logprob is None:
        raise ValueError(f"kl_coef={options.kl_coef} needs ref_logprob, got None")
    if options.entropy_coef != 0 and inputs.entropy is None:
        raise ValueError(f"entropy_coef={options.entropy_coef} needs entropy, got None")
    if inputs.sampler_logprob is None and (options.correction_low > 0 or options.correction_high < inf):
        raise ValueError("correction_low and correction_high need sampler_logprob, got None")
    if not 0 < options.log_ratio_clamp <= 80:
        raise ValueError(f"log_ratio_clamp must lie in (0, 80] (e^88 overflows f32), got {options.log_ratio_clamp}")
    if not (0 <= options.clip_low <= 1 and options.clip_high >= 0):
        raise ValueError(
            f"clip_low must lie in [0, 1] and clip_high be >= 0, got {options.clip_low}, {options.clip_high}"
        )
    if not (options.dual_clip > 1 and options.delta > 0):
        raise ValueError(f"dual_clip must be > 1 and delta > 0, got {options.dual_clip} and {options.delta}")
    if not (0 <= options.correction_low <= options.correction_high and options.correction_cap > 0):
        numbers = f"{options.correction_low}, {options.correction_high} and {options.correction_cap}"
        raise ValueError(f"correction_low <= correction_high must be >= 0 and correction_cap > 0, got {numbers}")


def reference(inputs: _Inputs, options: _Options) -> Tensor:
    """The formula, differentiable; [T] loss. A token's numbers are finite."""
    clamp = options.log_ratio_clamp
    advantage = inputs.advantage
    ratio = (inputs.logprob - inputs.old_logprob).clamp(-clamp, clamp).exp()
    unclipped = -ratio.clamp(max=options.delta) * advantage
    clipped = -ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * advantage
    # Not torch.maximum, which gives each of two equals half of the gradient.
    loss = torch.where(unclipped >= clipped, unclipped, clipped)
    if options.dual_clip < inf:
        held = -options.dual_clip * advantage
        loss = torch.where((advantage < 0) & (loss > held), held, loss)
    loss = loss * _correction(inputs, options)
    if inputs.ref_logprob is not None and options.kl_coef != 0:
        difference = inputs.logprob - inputs.ref_logprob
        value = _kl(difference, options.kl, clamp).detach()
        carrier = _kl(difference, options.kl_gradient, clamp)
        loss = loss + options.kl_coef * (value + carrier - carrier.detach())
    if inputs.entropy is not None:
        loss = loss - options.entropy_coef * inputs.entropy
    return loss


def _reference_derivative(inputs: _Inputs, options: _Options) -> Tensor:
    """[T] d loss / d logprob, by autograd."""
    with torch.enable_grad():
        leaf = inputs.logprob.detach().requires_grad_()
        derivative: Tensor = torch.autograd.grad(reference(inputs._replace(logprob=leaf), options).sum(), leaf)[0]
    return derivative


def _correction(inputs: _Inputs, options: _Options) -> Tensor | float:
    if inputs.sampler_logprob is None:
        return 1.0
    clamp = options.log_ratio_clamp
    rho = (inputs.old_logprob - inputs.sampler_logprob).clamp(-clamp, clamp).exp().detach()
    kept = (rho >= options.correction_low) & (rho <= options.correction_high)
    return torch.where(kept, rho.clamp(max=options.correction_cap), 0.0)


def _kl(difference: Tensor, kl: Kl, clamp: float) -> Tensor:
    """[T] estimator of the KL from d = l - l_ref."""
    d = difference.clamp(-clamp, clamp)
    if kl == Kl.K1:
        return d
    if kl == Kl.K2:
        return d.square() / 2
    return torch.expm1(-d) + d


def _kl_derivative(difference: Tensor, kl: Kl, clamp: float) -> Tensor:
    """[T] d kl / d l."""
    d = difference.clamp(-clamp, clamp)
    if kl == Kl.K1:
        slope = torch.ones_like(d)
    elif kl == Kl.K2:
        slope = d
    else:
        slope = -torch.expm1(-d)
    return torch.where(difference.abs() <= clamp, slope, 0.0)


def _closed_form(inputs: _Inputs, options: _Options) -> tuple[Tensor, Tensor]:
    """[T] loss and its derivative by logprob, without autograd."""
    clamp = options.log_ratio_clamp
    advantage = inputs.advantage
    log_ratio = inputs.logprob - inputs.old_logprob
    ratio = log_ratio.clamp(-clamp, clamp).exp()
    bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    unclipped = -ratio.clamp(max=options.delta) * advantage
    clipped = -bounded * advantage
    loss = torch.maximum(unclipped, clipped)
    moves = torch.where(unclipped >= clipped, ratio <= options.delta, bounded == ratio)
    moves &= log_ratio.abs() <= clamp
    if options.dual_clip < inf:
        held = -options.dual_clip * advantage
        binds = (advantage < 0) & (loss > held)
        loss = torch.where(binds, held, loss)
        moves &= ~binds
    correction = _correction(inputs, options)
    loss = loss * correction
    derivative = torch.where(moves, -ratio * advantage, 0.0) * correction
    if inputs.ref_logprob is not None and options.kl_coef != 0:
        difference = inputs.logprob - inputs.ref_logprob
        loss = loss + options.kl_coef * _kl(difference, options.kl, clamp)
        derivative = derivative + options.kl_coef * _kl_derivative(difference, options.kl_gradient, clamp)
    if inputs.entropy is not None:
        loss = loss - options.entropy_coef * inputs.entropy
    return loss, derivative


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, options = arguments
        loss, d_logprob = _closed_form(_Inputs(*tensors), options)
        ctx.save_for_backward(d_logprob)
        ctx.entropy_coef = options.entropy_coef
        ctx.mark_non_differentiable(d_logprob)
        return loss, d_logprob

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (d_logprob,) = ctx.saved_tensors
        d_entropy = -ctx.entropy_coef * d_loss if ctx.needs_input_grad[5] else None
        return d_loss * d_logprob, None, None, None, None, d_entropy, None


class _Fused(torch.autograd.Function):
    """One kernel for everything above, from the columns as the caller has them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        from fastrl.kernels import token_objective as kernel

        *tensors, options = arguments
        columns: list[Any] = [None if x is None else _float_column(x) for x in tensors]
        loss, *others = kernel.forward(*columns, **asdict(options))
        ctx.save_for_backward(others[0], tensors[-1], others[-1])
        ctx.entropy_coef = options.entropy_coef
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)  # no zeros for seven outputs that have no gradient
        return loss, *others

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_logprob, weight, nonfinite = ctx.saved_tensors
        d_entropy = None
        if ctx.needs_input_grad[5]:
            d_entropy = torch.where((weight != 0) & ~nonfinite, -ctx.entropy_coef * d_loss, 0.0)
        return d_loss * d_logprob, None, None, None, None, d_entropy, None, None


def _float_column(x: Tensor) -> Tensor:
    """Contiguous and floating: a bool mask or an integer advantage becomes f32."""
    return (x if x.is_floating_point() else x.float()).contiguous()


@torch.no_grad()
def _with_metrics(
    inputs: _Inputs, options: _Options, loss: Tensor, d_logprob: Tensor, used: Tensor, nonfinite: Tensor
) -> TokenObjective:
    """`loss` and what to log beside it."""
    clamp = options.log_ratio_clamp
    advantage = inputs.advantage
    ratio = (inputs.logprob - inputs.old_logprob).clamp(-clamp, clamp).exp()
    kl = torch.zeros_like(ratio)
    if inputs.ref_logprob is not None:
        kl = _kl(inputs.logprob - inputs.ref_logprob, options.kl, clamp)
    # For A < 0 the loss before the dual clip is max(min(r, delta), clip(r)) |A|.
    before = torch.maximum(ratio.clamp(max=options.delta), ratio.clamp(1 - options.clip_low, 1 + options.clip_high))
    return TokenObjective(
        loss=loss,
        d_logprob=torch.where(used, d_logprob, 0.0),
        ratio=torch.where(used, ratio, 0.0),
        kl=kl,
        clipped_low=(advantage < 0) & (ratio < 1 - options.clip_low),
        clipped_high=(advantage > 0) & (ratio > 1 + options.clip_high),
        dual_clipped=(advantage < 0) & (before > options.dual_clip),
        nonfinite=nonfinite,
    )
