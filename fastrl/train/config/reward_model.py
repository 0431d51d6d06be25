"""Models that score text: of preferences, and of the steps of a solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """A reward model from preferences: pairs, or ranked lists of any length.

    Attributes:
        learning_rate: AdamW's, at the end of warm-up; ten times as much for an adapter.
        center_rewards_coefficient: weight of (chosen + rejected)^2, which draws the scores around 0; None leaves out.
        max_length: completions that make more tokens with their prompt are refused.
    """

    learning_rate: float = 1e-5
    center_rewards_coefficient: float | None = None
    max_length: int | None = 1024


@dataclass(frozen=True, kw_only=True)
class PRMConfig(TrainConfig):
    """A process reward model: is each step of a solution right?

    Attributes:
        learning_rate: AdamW's, at the end of warm-up; ten times as much for an adapter.
        step_separator: text after each step, whose last token is where the step's score is read.
        train_on_last_step_only: learn the label of the last step alone; held-out rows are judged at every step.
        aggregation: how the steps' probabilities become the solution's, in the held-out metrics.
        max_length: solutions that make more tokens with their prompt are refused.
    """

    learning_rate: float = 1e-5
    step_separator: str = "\n"
    train_on_last_step_only: bool = False
    aggregation: Literal["min", "product", "last"] = "min"
    max_length: int | None = 1024
