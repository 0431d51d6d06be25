"""What a token contributes to the policy's loss: functions of its log-ratio and its advantage, nothing else.

Every function maps `(log_ratio [T], advantage [T]) -> [T]` loss per token, unweighted, to be minimised.
GPG's surrogate is `reinforce`; LUSPO's is `clipped` under `ratio.sequence_ratio` and `weighting.sequence_sum`;
DPPO's is `cispo` under `trust_region.binary_tv` or `binary_kl`. Each has a preset.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """PPO's pessimistic surrogate, with clip-higher, dual clip and TRL's cap.

        loss[t] = -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A),    r = exp(log_ratio)
        loss[t] = min(loss[t], -dual_clip A)    where A < 0

    Gradient: -r A where the first term is the smaller one (no gradient where a clip or cap binds).

    Args:
        log_ratio: [T] log-probability now minus under the policy that defines the ratio, nats; differentiable.
        advantage: [T] in units of reward; a constant.
        low: how far r may fall below 1 before a negative advantage stops pushing.
        high: how far r may rise above 1 before a positive advantage stops pushing; high > low is clip-higher.
        dual_clip: c > 1 holds the loss of a negative advantage at -c A; None is off (verl: 3).
        delta: cap of r before the minimum, for negative advantages; above 1 + high; None is off.

    Returns:
        [T] loss per token, unweighted.

    Source: Schulman 2017, arXiv:1707.06347, eq. 7; Yu 2025 (DAPO), arXiv:2503.14476, eq. 10 (clip-higher);
    Ye 2020, arXiv:1912.09729, eq. 5 (dual clip); INTELLECT-2, arXiv:2505.07291, sec. 3.4 (delta).
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    loss = -torch.minimum(ratio * advantage, bounded * advantage)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def cispo(log_ratio: Tensor, advantage: Tensor, *, high: float = 5.0) -> Tensor:
    """REINFORCE with a capped, detached importance weight: every token keeps a gradient.

        loss[t] = -stop(min(r[t], high)) A[t] log_ratio[t],    r = exp(log_ratio)

    Gradient: -min(r, high) A.

    Args:
        log_ratio: [T] log-probability now minus when sampled, nats; differentiable.
        advantage: [T] in units of reward; a constant.
        high: cap on r itself, not on its distance from 1 (open-instruct's 0.272 is 1.272 here).

    Returns:
        [T] loss per token, unweighted. The paper multiplies by the log-probability, which
        differs by a constant: the gradient is the same, the reported value is not.

    Source: MiniMax 2025, arXiv:2506.13585, sec. 3.1.
    """
    return -log_ratio.exp().clamp(max=high).detach() * advantage * log_ratio


def reinforce(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Plain policy gradient, without an importance weight (also GPG's).

        loss[t] = -A[t] log_ratio[t]

    Gradient: -A everywhere.

    Args:
        log_ratio: [T] log-probability now minus a constant, nats; differentiable. Its value shifts the loss only.
        advantage: [T] in units of reward; a constant.

    Returns:
        [T] loss per token, unweighted; 0 with gradient -A when the log-ratio is measured against itself.

    Source: Williams 1992, "Simple statistical gradient-following algorithms", eq. 4; Chu 2025 (GPG), arXiv:2504.02546.
    """
    return -advantage * log_ratio


def sapo(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """A smooth gate in place of the clip: a sigmoid around r = 1 whose slope there is 1.

        loss[t] = -(4 / tau) sigmoid(tau (r - 1)) A,    tau by the sign of A

    Gradient: -4 sigmoid(tau (r - 1)) (1 - sigmoid(tau (r - 1))) r A, which is -A at r = 1 and fades on both sides.

    Args:
        log_ratio: [T] log-probability now minus under the policy that defines the ratio, nats; differentiable.
        advantage: [T] in units of reward; a constant.
        temperature_positive: tau where A > 0.
        temperature_negative: tau where A <= 0; larger fades faster.

    Returns:
        [T] loss per token, unweighted.

    Source: Gao 2025, arXiv:2511.20347, sec. 3; the constants are TRL's and verl's form.
    """
    tau = torch.full_like(log_ratio, temperature_negative).masked_fill(advantage > 0, temperature_positive)
    return -(4 / tau) * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantage


def vespo(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> Tensor:
    """REINFORCE under a Gamma-shaped, detached weight of the sequence's importance ratio.

        loss[t] = -stop(phi(W)) A log_ratio,    phi(W) = W^k exp(k' (1 - W)),    W = exp(log_ratio)

    phi(1) = 1; k is `power`, k' is `decay`, chosen by the sign of A. Gradient: -phi(W) A.

    Args:
        log_ratio: [T] log W, the *sum* of the sequence's token log-ratios with the gradient of the token's own:
            what `ratio.sequence_product` returns; differentiable. Measured against the sampler in the paper.
        advantage: [T] in units of reward; a constant.
        power_positive, decay_positive: k and k' where A >= 0.
        power_negative, decay_negative: k and k' where A < 0.

    Returns:
        [T] loss per token, unweighted; differs from the paper's by a constant, as `cispo` does. log W is held
        in [ln 1e-8, 20] inside phi, as in the authors' code.

    Source: Shen 2026, arXiv:2602.10693, sec. 3.4; constants of the authors' code and TRL.
    """
    phi = gamma_weight(
        log_ratio,
        advantage,
        power_positive=power_positive,
        decay_positive=decay_positive,
        power_negative=power_negative,
        decay_negative=decay_negative,
    )
    return -phi * advantage * log_ratio


def gamma_weight(
    log_weight: Tensor,
    advantage: Tensor,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> Tensor:
    """[T] VESPO's phi(W) = W^k exp(k' (1 - W)), constant; arguments as `vespo`, with log W read as a constant."""
    log_weight = log_weight.detach().clamp(math.log(1e-8), 20.0)
    power = torch.full_like(log_weight, power_negative).masked_fill(advantage >= 0, power_positive)
    decay = torch.full_like(log_weight, decay_negative).masked_fill(advantage >= 0, decay_positive)
    return (decay + power * log_weight - decay * log_weight.exp()).exp()
