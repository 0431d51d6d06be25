"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning.

    Attributes:
        completion_only_loss: train on completion tokens only (prompt-completion data).
        assistant_only_loss: train on assistant turns only (messages data).
        loss_type: of one token: "nll" is cross entropy, "dft" weighs it by the token's own probability.
        label_smoothing: share of the target's probability spread over the vocabulary.
        max_length: sequences with more tokens are refused, or cut when truncate is set.
        truncate: cut over-long sequences on the right instead of refusing them; the count is logged.
    """

    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    loss_type: Literal["nll", "dft"] = "nll"
    label_smoothing: float = 0.0
    max_length: int | None = 1024
    truncate: bool = False
