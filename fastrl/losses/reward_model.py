"""Losses of models that score text: pairs, ranked lists and steps; and how well their probabilities are calibrated.

P(a better than b) = sigmoid(score[a] - score[b])
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the preference that was observed.

        loss[p] = -log sigmoid(chosen[p] - rejected[p] - margin[p])

    Args:
        chosen: [P] score of the better completion; differentiable.
        rejected: [P] score of the worse one; differentiable.
        margin: [P] how far apart they should be, in units of score; a constant. None is 0.

    Returns:
        [P] nats; log 2 where the scores are as far apart as the margin. The gradient with respect to `chosen` is
        sigmoid(chosen - rejected - margin) - 1, and its opposite with respect to `rejected`.

    Source: Bradley and Terry 1952; Ouyang 2022, arXiv:2203.02155, eq. 1; margin: Touvron 2023, arXiv:2307.09288,
    eq. 2; TRL `RewardTrainer`.
    """
    difference = chosen - rejected
    return -logsigmoid(difference if margin is None else difference - margin)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[P] (chosen + rejected)^2: draws the scores of a pair around 0, which differences alone leave free.

    Source: Eisenstein 2023, arXiv:2312.09244; TRL `center_rewards_coefficient`.
    """
    return (chosen + rejected).square()


def ranked_pairs(quality: Tensor) -> Tensor:
    """All pairs of a prompt's completions of which one is better.

    InstructGPT averages `bradley_terry` over the K choose 2 pairs of a prompt, and then over prompts, all of a prompt
    in one batch: as separate rows, each completion would be overfitted in K - 1 gradient updates.

    Args:
        quality: [K] of one prompt's completions, higher is better; a constant.

    Returns:
        [P, 2] int64, (better, worse) places in the list; K (K - 1) / 2 of them when no two are equal.

    Source: Ouyang 2022, arXiv:2203.02155, sec. 3.5.
    """
    return (quality[:, None] > quality[None, :]).nonzero()


def step_cross_entropy(score: Tensor, is_right: Tensor) -> Tensor:
    """Binary cross entropy of each step of a solution.

        loss[k] = -log sigmoid(score[k]) when the step is right, -log sigmoid(-score[k]) when it is wrong

    Args:
        score: [K] score of the prefix that ends with the step, a logit; differentiable.
        is_right: [K] bool; a constant.

    Returns:
        [K] nats; gradient sigmoid(score) - is_right.

    Source: Lightman 2023, arXiv:2305.20050, sec. 2.6; Wang 2023, arXiv:2312.08935, sec. 3.3.
    """
    return -logsigmoid(torch.where(is_right, score, -score))


def weakest(probability: Tensor) -> Tensor:
    """[K] P(step is right) -> [] the least of them: a chain is as strong as its weakest step.

    Source: Lightman 2023, arXiv:2305.20050, app. F; Wang 2023, arXiv:2312.08935, sec. 3.4.
    """
    return probability.amin(-1)


def product(probability: Tensor) -> Tensor:
    """[K] P(step is right) -> [] their product: P(every step is right) for independent steps; shorter is likelier.

    Source: Lightman 2023, arXiv:2305.20050, sec. 2.6.
    """
    return probability.prod(-1)


def last(probability: Tensor) -> Tensor:
    """[K] P(step is right) -> [] the last: a judgement of the whole, as an outcome reward model gives."""
    return probability[..., -1]


def brier(probability: Tensor, outcome: Tensor) -> Tensor:
    """[K] squared distance of a probability from what happened: 0.25 for a coin's 0.5, 0 for a certain truth.

    Args:
        probability: [K] in [0, 1].
        outcome: [K] bool.

    Source: Brier 1950, Monthly Weather Review 78.
    """
    return (probability - outcome.to(probability.dtype)).square()


def expected_calibration_error(confidence: Tensor, is_right: Tensor, *, bins: int = 10) -> Tensor:
    """How far confidence is from accuracy, over bins of equal width.

        ECE = sum over bins b of n_b / N |accuracy_b - mean confidence_b|

    Args:
        confidence: [N] probability given to the answer that was chosen, in [0, 1]; a constant. Of a pair of
            completions, sigmoid(|margin|), so at least 0.5.
        is_right: [N] bool, whether that answer was right.
        bins: of [0, 1]; the upper border belongs to a bin, so that 1 is in the last.

    Returns:
        [] f64 in [0, 1].

    Source: Guo 2017, arXiv:1706.04599, eq. 3.
    """
    member = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    return gap.index_add(0, member, is_right.double() - confidence.double()).abs().sum() / len(confidence)
