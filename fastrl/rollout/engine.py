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
        segment_tokens: most tokens to sample in one call, for completions made in segments: one that reaches neither
            its end nor `max_completion_length` comes back with finish_reason "length" and goes on as the prefix of
            another call. None samples to the end.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    segment_tokens: int | None = None


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
        ("segment_tokens", sampling.segment_tokens is None or sampling.segment_tokens >= 1, "at least 1, or None"),
        ("repetition_penalty", 0.0 < sampling.repetition_penalty < math.inf, "a positive number; 1 is none"),
    )
    for name, is_good, range_ in rules:
        if not is_good:
            raise ValueError(f"sampling.{name} must be {range_}, got {getattr(sampling, name)}")
    if "" in sampling.stop:
        raise ValueError("sampling.stop holds an empty string, which would end every completion at its first token")


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, context: int) -> None:
    """Refuse what cannot be completed, by its place: an empty prompt, one without room, ids of another vocabulary.

    Args:
        vocab_size: V, the ids the model knows.
        context: most tokens the model holds, prompt and completion together.

    Raises:
        ValueError: the first such prompt.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give at least one token, such as the tokenizer's BOS")
        if len(prompt) + 1 > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room to sample in the model's context of "
                f"{context}; shorten or drop it"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {i} holds token {min(prompt) if min(prompt) < 0 else max(prompt)}, but the model's vocabulary "
                f"is [0, {vocab_size}); was it made with another tokenizer?"
            )


def limits_of(
    prompt_lengths: Sequence[int], prefix_lengths: Sequence[int], sampling: Sampling, context: int
) -> list[int]:
    """How many tokens one call may sample for each prompt: what the limit, the context and the segment leave.

        limit = min(min(max_completion_length, context - prompt) - prefix, segment_tokens)

    Args:
        context: most tokens the model holds, prompt and completion together.

    Raises:
        ValueError: another number of prefixes than of prompts, or a prefix that leaves no room for a single token.
    """
    if len(prefix_lengths) != len(prompt_lengths):
        raise ValueError(
            f"prefixes must have one entry per prompt: got {len(prefix_lengths)} for {len(prompt_lengths)} prompts"
        )
    limits = []
    for i, (prompt, prefix) in enumerate(zip(prompt_lengths, prefix_lengths, strict=True)):
        room = min(sampling.max_completion_length, context - prompt)
        if prefix >= room:
            raise ValueError(
                f"prefix {i} has {prefix} tokens, and completion {i} may have {room} (max_completion_length is "
                f"{sampling.max_completion_length}, the context {context}, the prompt {prompt}): it has ended already"
            )
        limits.append(min(room - prefix, sampling.segment_tokens or room))
    return limits


class Engine(Protocol):
    """What a recipe needs from a sampler. `tests/rollout/contract.py` is the meaning of each method."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """Sample one completion per prompt, in order.

        Args:
            prompts: token ids; the caller repeats a prompt to sample a group.
            sampling: one set of parameters for the call.
            seeds: one per prompt. A completion depends on the weights, its prompt, the sampling and its
                seed alone, not on its neighbours. None draws fresh seeds from the engine's own generator.
            prefixes: one per prompt, the tokens of its completion that are sampled already and have not ended it; may
                be empty. The engine goes on as if it had never stopped: limits, stop strings, the repetition penalty
                and random positions count the prefix. None is an empty prefix for each.

        Returns:
            A rollout per prompt, with the new tokens alone: the prefix is in neither `prompt_ids` nor
            `completion_ids`.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for a single token, with its prefix.
        """
        ...

    def load_weights(self, model: nn.Module, version: int) -> None:
        """Make the next `generate` sample from `model`'s weights and stamp `version` on its rollouts."""
        ...

    def rest(self) -> None:
        """No call of `generate` comes before the next `load_weights`: hand memory back until then, if that helps."""
        ...
