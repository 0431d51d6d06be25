"""Losses of preference pairs: `(chosen [P], rejected [P], *, beta) -> [P]`, to be minimised.

    d = chosen - rejected,    s = log sigmoid

`chosen` and `rejected` score whole sequences, in nats: log-ratios log pi(y|x) - log pi_ref(y|x) in DPO and its
relatives, log-probabilities where there is no reference (CPO). Functions have the name of TRL's `loss_type`. How the
scores are summed or averaged over tokens is the caller's choice; `sigmoid` of averaged scores is TRL's `sigmoid_norm`.
"""

from __future__ import annotations

from math import log, log1p

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, or cDPO with label smoothing: the pair is a coin whose odds are exp(beta d).

        loss = -(1 - e) s(beta d) - e s(-beta d)

    Args:
        chosen, rejected: [P] scores, nats; differentiable.
        beta: how strongly the policy is held to the reference.
        label_smoothing: e, how likely a label is flipped. TRL 1.16 ignores it here.

    Returns:
        [P] loss per pair.

    Source: Rafailov 2023, arXiv:2305.18290, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    logit = beta * (chosen - rejected)
    if label_smoothing == 0:
        return -logsigmoid(logit)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def robust(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO whose expected value under flipped labels is that of clean ones.

        loss = (-(1 - e) s(beta d) + e s(-beta d)) / (1 - 2 e)

    Args:
        label_smoothing: e in [0, 1/2), the share of labels that are flipped.

    Source: Chowdhury 2024, arXiv:2403.00409.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing of robust must be in [0, 0.5), got {label_smoothing}")
    logit = beta * (chosen - rejected)
    clean, flipped = logsigmoid(logit), logsigmoid(-logit)
    return (label_smoothing * flipped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """SLiC's margin: max(0, 1 - beta d); gradient 0 from beta d = 1 on.

    Source: Zhao 2023, arXiv:2305.10425; with log-ratios Liu 2023 (RSO), arXiv:2309.06657.
    """
    return torch.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2: the margin is regressed on a number, so it cannot run away.

    TRL averages the scores over each completion's tokens, OpenRLHF sums them: 1 / (2 beta) is then a margin per
    token or per sequence.

    Args:
        beta: the paper's tau.

    Source: Azar 2023, arXiv:2310.12036, eq. 17.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def exo_pair(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Reverse KL from the policy's two-way choice q to the smoothed label (1 - e, e).

        loss = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e),    q = sigmoid(beta d)

    Args:
        label_smoothing: e in (0, 1); the paper uses 1e-3.

    Source: Ji 2024, arXiv:2402.00856, eq. 16.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing of exo_pair must be in (0, 1), got {label_smoothing}")
    logit = beta * (chosen - rejected)
    log_win, log_lose = logsigmoid(logit), logsigmoid(-logit)
    win = log_win.exp() * (log_win - log1p(-label_smoothing))
    return win + log_lose.exp() * (log_lose - log(label_smoothing))


def nca_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Noise contrastive alignment: raises the chosen likelihood itself, not the margin alone.

        loss = -s(beta chosen) - s(-beta chosen) / 2 - s(-beta rejected) / 2

    Source: Chen 2024, arXiv:2402.05369, its loss for pairs.
    """
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def bco_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Binary classification of each response: -s(beta chosen) - s(-beta rejected), without a reward shift.

    Source: Jung 2024, arXiv:2404.04656.
    """
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2: self-play with win probabilities 1 and 0.

    Source: Wu 2024, arXiv:2405.00675, eq. 4.7 with hard labels.
    """
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """sigmoid(-beta chosen) + sigmoid(beta rejected): raise the chosen, lower the rejected.

    For answers better than the policy's own.

    Source: D'Oosterlinck 2024, arXiv:2408.06266, eq. 7.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """sigmoid(beta chosen) + sigmoid(-beta d): lower the chosen, and the rejected more.

    For answers worse than the policy's own.

    Source: D'Oosterlinck 2024, arXiv:2408.06266, eq. 8.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def discopop(chosen: Tensor, rejected: Tensor, *, beta: float, tau: float = 0.05) -> Tensor:
    """The log-ratio modulated loss that a language model found.

        loss = -(1 - m) s(beta d) + m exp(-beta d),    m = sigmoid(beta d / tau)

    Args:
        tau: width of the change from the logistic to the exponential term.

    Source: Lu 2024, arXiv:2406.08414, eq. 5.
    """
    logit = beta * (chosen - rejected)
    # sigmoid(-x) for 1 - sigmoid(x): the difference would lose its digits where m is close to 1.
    return torch.sigmoid(logit / tau) * torch.exp(-logit) - torch.sigmoid(-logit / tau) * logsigmoid(logit)
