"""Rollouts and encoded rows as token sequences: which tokens train, with what weight and advantage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from fastrl.data.pack import TokenSequence
from fastrl.types import Rollout


def trained_length(rollout: Rollout) -> int:
    """Count the tokens of a rollout that the policy chose, which are the tokens that train."""
    return len(rollout.completion_ids) if rollout.is_sampled is None else sum(rollout.is_sampled)


def rollout_sequences(
    rollouts: Sequence[Rollout],
    *,
    weight: Sequence[float],
    advantage: Sequence[float],
    credit: Sequence[Sequence[float]] | None = None,
) -> list[TokenSequence]:
    """Lay rollouts out for training; every column is aligned with the ids, unshifted.

    The columns of one call are slices of one array each: at a few tokens a sequence, making four arrays for every
    sequence costs as much as packing them.

    Args:
        weight: [S] of each trained token in the optimizer step's loss; tokens the policy did not choose get 0.
        advantage: [S] of the completions, in units of reward; 0 on the prompt.
        credit: [S][completion tokens] added to it; None is nothing.
    """
    prompt = np.array([len(rollout.prompt_ids) for rollout in rollouts], dtype=np.int64)
    length = prompt + np.array([len(rollout.completion_ids) for rollout in rollouts], dtype=np.int64)
    end = np.cumsum(length)
    start = end - length
    total = int(length.sum())
    position = np.arange(total) - np.repeat(start, length)
    is_completion = position >= np.repeat(prompt, length)

    ids = np.fromiter(chain.from_iterable((*x.prompt_ids, *x.completion_ids) for x in rollouts), np.int64, count=total)
    weights = np.repeat(np.asarray(weight, np.float32), length) * is_completion
    advantages = np.repeat(np.asarray(advantage, np.float32), length) * is_completion
    if credit is not None:
        advantages[is_completion] += np.fromiter(chain.from_iterable(credit), np.float32)
    sampled = np.zeros(total, np.float32)
    sampled[is_completion] = np.fromiter(chain.from_iterable(rollout.logprob for rollout in rollouts), np.float32)
    sequences = []
    for rollout, first, last, n in zip(rollouts, start.tolist(), end.tolist(), prompt.tolist(), strict=True):
        if rollout.is_sampled is not None:
            weights[first + n : last] *= np.asarray(rollout.is_sampled, np.float32)
        here = slice(first, last)
        sequences.append(TokenSequence(ids[here], weights[here], advantages[here], sampled[here]))
    return sequences


def supervised_sequence(ids: Sequence[int], is_trained: Sequence[bool], *, weight: float) -> TokenSequence:
    """Lay an encoded row out for supervised training: the same weight on every trained token."""
    return TokenSequence(
        ids=np.asarray(ids, np.int64), weight=np.float32(weight) * np.asarray(is_trained, dtype=np.float32)
    )
