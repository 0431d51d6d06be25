"""Sequences that begin alike: which of their positions a causal model need compute only once.

    prompt a b c, completions d e and f:     a b c d e          a b c d e
                                             a b c f            . . . f       three positions of nine are not fed

A position of a causal model depends on the tokens up to it and on nothing else. The completions of a group, the two
sides of a preference pair and rows under one system prompt share such positions, as a tree shares its stem.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAST_SAVED = 0.1  # of a batch's positions; below that, taking rows apart and together costs what it saves


def in_order(fed: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort sequences by their tokens, so that those with the longest common beginnings stand side by side.

    Args:
        fed: the tokens of each sequence, without the last one, which is only predicted.

    Returns:
        order [S] of the sequences; common [S], the tokens with which each one in this order begins as the one before
        it does, 0 for the first.

    Cost: O(tokens) for the comparisons, O(S log S) of them.
    """
    keys = [each.astype(">i8").tobytes() for each in fed]
    order = sorted(range(len(fed)), key=keys.__getitem__)
    common = np.zeros(len(fed), dtype=np.int64)
    for place in range(1, len(order)):
        common[place] = _common(fed[order[place - 1]], fed[order[place]])
    return np.array(order, dtype=np.int64), common


def bundles(
    lengths: NDArray[np.int64], order: NDArray[np.int64], common: NDArray[np.int64], *, most: int
) -> list[list[int]]:
    """Cut the order into runs that are worth keeping in one batch: a quarter or more of a sequence is shared.

    Args:
        lengths: [S] positions of each sequence.
        order, common: of `in_order`.
        most: positions of a bundle, sharing not counted; a longer sequence is a bundle of its own.
    """
    runs: list[list[int]] = []
    total = 0
    for place, index in enumerate(order.tolist()):
        length = int(lengths[index])
        is_alike = place > 0 and 4 * common[place] >= min(length, lengths[order[place - 1]])
        if is_alike and total + length <= most:
            runs[-1].append(index)
            total += length
        else:
            runs.append([index])
            total = length
    return runs


def first_alike(
    members: NDArray[np.int64], start: NDArray[np.int64], lengths: NDArray[np.int64], common: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[T] the position of a batch that has the same tokens up to it as position t; itself where nothing came before.

    Args:
        members: [K] places of the batch's sequences in the order of `in_order`, ascending.
        start, lengths: [K] first position in the batch, and positions, of each of them.
        common: of `in_order`.
    """
    same = np.arange(int(lengths.sum()))
    for k in range(1, len(members)):
        shared = int(common[members[k - 1] + 1 : members[k] + 1].min())
        same[start[k] : start[k] + shared] = same[start[k - 1] : start[k - 1] + shared]
    return same


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Tokens at the beginning that both have."""
    n = min(len(one), len(other))
    differs = one[:n] != other[:n]
    return int(differs.argmax()) if differs.any() else n
