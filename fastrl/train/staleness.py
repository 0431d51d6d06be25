"""How far behind the sampled tokens are: versions of the weights, and importance ratios of trainer over sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.train.update import BatchLoss
from fastrl.types import LossOutput, Rollout, TokenBatch

RATIO = "sampling/importance_ratio"


def token_versions(rollout: Rollout) -> tuple[int, ...]:
    """The version of the weights that chose each completion token."""
    if rollout.token_version is not None:
        return rollout.token_version
    return (rollout.policy_version,) * len(rollout.completion_ids)


def is_fresh(rollouts: Sequence[Rollout], *, version: int) -> bool:
    """Whether every token was chosen by the weights of `version`."""
    return all({each.policy_version, *(each.token_version or ())} == {version} for each in rollouts)


def staleness_metrics(rollouts: Sequence[Rollout], *, version: int) -> dict[str, float]:
    """Mean and maximum over tokens of the versions between the weights that chose them and those that learn first.

    Args:
        version: optimizer steps taken before the round is learned; versions count those.
    """
    ages = [version - each for rollout in rollouts for each in token_versions(rollout)]
    if not ages:
        return {}
    return {"sampling/staleness/mean": sum(ages) / len(ages), "sampling/staleness/max": float(max(ages))}


class RatioRange:
    """Smallest, largest and spread of `exp(l_old - l_mu)` over one optimizer step, seen as its loss is computed.

    The effective sample size is a share of the tokens, (sum w)^2 / (N sum w^2): 1 when all weights are equal.

    Source: Kong 1992, "A note on importance sampling using standardized weights".
    """

    def __init__(self, batch_loss: BatchLoss) -> None:
        self._batch_loss = batch_loss
        self._seen: list[Tensor] = []

    def __call__(self, batch: TokenBatch) -> LossOutput:
        output = self._batch_loss(batch)
        ratio = output.metrics[RATIO][batch.weight != 0].double()
        if len(ratio):
            n = ratio.new_tensor(len(ratio))
            self._seen.append(torch.stack([ratio.min(), ratio.max(), ratio.sum(), ratio.square().sum(), n]))
        return output

    def metrics(self) -> dict[str, float]:
        """Of the batches of this process; {} when none had a trained token."""
        if not self._seen:
            return {}
        low, high, total, squares, n = torch.stack(self._seen).cpu().unbind(1)
        return {
            f"{RATIO}/min": float(low.min()),
            f"{RATIO}/max": float(high.max()),
            f"{RATIO}/effective_share": float(total.sum().square() / (n.sum() * squares.sum())),
        }
