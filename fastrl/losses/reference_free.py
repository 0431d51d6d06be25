"""Losses of preference pairs that need no reference model: SimPO and ORPO, on length-averaged log-probabilities.

CPO is `preference.sigmoid` or `preference.hinge` of summed log-probabilities, plus `cpo_alpha` x NLL of the chosen.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST = -(2.0**-24)  # log of the largest float32 below 1: a certain sequence would have infinite odds


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO without a reference, on averages per token and with a target margin.

        loss = -(1 - e) s(x) - e s(-x),    x = beta (chosen - rejected) - gamma,    s = log sigmoid

    Args:
        chosen, rejected: [P] mean log-probability per completion token, nats; differentiable.
        beta: scale of the rewards; the paper uses 2 to 10.
        gamma: margin beta (chosen - rejected) is to exceed.
        label_smoothing: e, how likely a label is flipped.

    Returns:
        [P] loss per pair.

    Source: Meng 2024, arXiv:2405.14734, eq. 6.
    """
    logit = beta * (chosen - rejected) - gamma
    if label_smoothing == 0:
        return -logsigmoid(logit)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-beta log sigmoid(log odds ratio), which ORPO adds to the NLL of the chosen sequence.

    Args:
        chosen, rejected: [P] mean log-probability per completion token, nats; differentiable.
        beta: weight of the odds ratio; the paper's lambda.

    Returns:
        [P] loss per pair, without the NLL.

    Source: Hong 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    return -beta * logsigmoid(log_odds_ratio(chosen, rejected))


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)), odds(l) = p / (1 - p), p = exp(l).

    Args:
        chosen, rejected: [P] mean log-probability per token, nats; differentiable. From -2^-24 on they count as
            -2^-24, without gradient.

    Returns:
        [P] nats.
    """
    chosen, rejected = chosen.clamp(max=LARGEST), rejected.clamp(max=LARGEST)
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, to the last digits at both ends (Maechler 2012)."""
    is_near = x > -log(2)
    # Each branch gets harmless values where the other is taken: an infinite slope times 0 would be NaN.
    near = torch.log(-torch.expm1(torch.where(is_near, x, -1.0)))
    return torch.where(is_near, near, torch.log1p(-torch.exp(torch.where(is_near, -1.0, x))))
