"""Rollouts and encoded rows as token sequences: which tokens train, with what weight and advantage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastrl.data.pack import TokenSequence
from fastrl.types import Rollout


def trained_length(rollout: Rollout) -> int:
    """Count the tokens of a rollout that the policy chose, which are the tokens that train."""
    return len(rollout.completion_ids) if rollout.is_sampled is None else sum(rollout.is_sampled)


def rollout_sequence(rollout: Rollout, *, weight: float, advantage: float) -> TokenSequence:
    """Lay a rollout out for training; every column is aligned with the ids, unshifted.

    Args:
        weight: of each trained token in the optimizer step's loss; tokens the policy did not choose get 0.
        advantage: of the completion, in units of reward; 0 on the prompt.
    """
    start = len(rollout.prompt_ids)
    ids = np.fromiter((*rollout.prompt_ids, *rollout.completion_ids), np.int64)
    weights, advantages, sampled = (np.zeros(len(ids), np.float32) for _ in range(3))
    weights[start:] = weight if rollout.is_sampled is None else weight * np.asarray(rollout.is_sampled, np.float32)
    advantages[start:] = advantage
    sampled[start:] = rollout.logprob
    return TokenSequence(ids=ids, weight=weights, advantage=advantages, sampler_logprob=sampled)


def supervised_sequence(ids: Sequence[int], is_trained: Sequence[bool], *, weight: float) -> TokenSequence:
    """Lay an encoded row out for supervised training: the same weight on every trained token."""
    return TokenSequence(
        ids=np.asarray(ids, np.int64), weight=np.float32(weight) * np.asarray(is_trained, dtype=np.float32)
    )
