"""Rewards that are models of ours: what a configuration says of them. `fastrl.train.learned_rewards` loads them.

Nothing here imports torch, so that a configuration with such a reward is checked in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

AGGREGATES = ("min", "product", "last")


@dataclass(frozen=True)
class RewardModel:
    """The score a model with a scalar head gives to prompt and completion, read at the last token.

    Attributes:
        path: its directory, as `fastrl reward` writes it; its tokens are the policy's.
        scale: the reward is the score divided by it.
    """

    path: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"reward_model: scale must be above 0, got {self.scale}")

    @property
    def __name__(self) -> str:
        return "reward_model"

    def __call__(self, prompts: Sequence[object], completion_ids: Sequence[object]) -> NoReturn:
        """Refuse: the model is not loaded."""
        raise RuntimeError(_unloaded(self.path))


@dataclass(frozen=True)
class ProcessRewardModel:
    """The probabilities a process reward model gives to the steps of a completion, made one number.

    Attributes:
        path: its directory, as `fastrl prm` writes it.
        separator: what parts the steps, as in its training.
        aggregate: of the probabilities: "min", "product" or "last".
    """

    path: str
    separator: str = "\n"
    aggregate: str = "min"

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            names = ", ".join(AGGREGATES)
            raise ValueError(f"process_reward_model: aggregate must be one of {names}, got {self.aggregate!r}")
        if not self.separator:
            raise ValueError("process_reward_model: separator must not be empty; steps could not be told apart")

    @property
    def __name__(self) -> str:
        return "process_reward_model"

    def __call__(self, prompts: Sequence[object], completions: Sequence[object]) -> NoReturn:
        """Refuse: the model is not loaded."""
        raise RuntimeError(_unloaded(self.path))


def _unloaded(path: str) -> str:
    return f"the model {path} of this reward is not loaded; fastrl.train.learned_rewards.loaded does that"
