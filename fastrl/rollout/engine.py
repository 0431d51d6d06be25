"""The engine protocol: what samples completions, and the sampling parameters it must honour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastrl.types import Rollout

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a completion. Filters apply in the order penalty, temperature, top-k, top-p, min-p.

    Attributes:
        max_completion_length: most tokens to sample.
        temperature: divides the logits; 0 is greedy (log-probabilities are then those of temperature 1).
        top_p: keep the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: keep tokens at least this share of the most likely token's probability; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the
            prompt or completion (CTRL, arXiv:1909.05858); 1 is none.
        stop: strings that end a completion; the tokens that contain the match are kept.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()


def check_sampling(sampling: Sampling) -> None:
    """Refuse parameters that describe no distribution; one sentence that names the field.

    Raises:
        ValueError: a value out of range, or not a number.
    """
    rules = (
        ("max_completion_length", sampling.max_completion_length >= 1, "at least 1"),
        ("temperature", 0.0 <= sampling.temperature < math.inf, "0 (greedy) or a positive number"),
        ("top_p", 0.0 < sampling.top_p <= 1.0, "in (0, 1]; 1 keeps all tokens"),
        ("top_k", sampling.top_k >= 0, "0 (keep all) or a positive integer"),
        ("min_p", 0.0 <= sampling.min_p <= 1.0, "in [0, 1]; 0 keeps all tokens"),
        ("repetition_penalty", 0.0 < sampling.repetition_penalty < math.inf, "a positive number; 1 is none"),
    )
    for name, is_good, range_ in rules:
        if not is_good:
            raise ValueError(f"sampling.{name} must be {range_}, got {getattr(sampling, name)}")
    if "" in sampling.stop:
        raise ValueError("sampling.stop holds an empty string, which would end every completion at its first token")


class Engine(Protocol):
    """What a recipe needs from a sampler. `tests/rollout/contract.py` is the meaning of each method."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        """Sample one completion per prompt, in order.

        Args:
            prompts: token ids; the caller repeats a prompt to sample a group.
            sampling: one set of parameters for the call.
            seeds: one per prompt. A completion depends on the weights, its prompt, the sampling and its
                seed alone, not on its neighbours. None draws fresh seeds from the engine's own generator.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for a single token.
        """
        ...

    def load_weights(self, model: nn.Module, version: int) -> None:
        """Make the next `generate` sample from `model`'s weights and stamp `version` on its rollouts."""
        ...
