"""Randomness by counting: the uniform number of a draw is a hash of (seed, position), with no state to carry.

    u(seed, position) = splitmix64(splitmix64(seed) + position * GOLDEN) / 2^64

Integer arithmetic alone, so a draw is the same on every device, for every batch and after every restart.
Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA, fig. 17 (splitmix64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB
MASK = (1 << 64) - 1


def request_seed(run_seed: int, prompt_ordinal: int, sample_index: int) -> int:
    """Seed of one completion, a pure function of its place in the run.

        splitmix64(splitmix64(splitmix64(run_seed) + prompt_ordinal) + sample_index) / 2

    Args:
        run_seed: the run's seed.
        prompt_ordinal: number of prompts the run has taken before this one.
        sample_index: place in the prompt's group.

    Returns:
        An integer in [0, 2^63), which fits a signed 64-bit field of any format.
    """
    state = 0
    for part in (run_seed, prompt_ordinal, sample_index):
        state = _mixed((state + part) & MASK)
    return state >> 1


def streams(seeds: Sequence[int], device: torch.device, *, start: Sequence[int] | None = None) -> Tensor:
    """[B] int64 start of each seed's stream, seeds modulo 2^64; the mixing keeps streams of near seeds apart.

    Args:
        start: [B] positions to begin at, of completions that go on; None is 0 for each.
    """
    moved = [_mixed(seed & MASK) + GOLDEN * first for seed, first in zip(seeds, start or [0] * len(seeds), strict=True)]
    return torch.tensor([_signed(state & MASK) for state in moved], dtype=torch.int64, device=device)


def uniform(stream: Tensor, position: int) -> Tensor:
    """[B] float64 in [0, 1), a multiple of 2^-53: the number of each stream at a position.

    Args:
        stream: [B] int64 from `streams`.
        position: index of the token within its completion, less the `start` of its stream.
    """
    x = stream + _signed(GOLDEN * (position + 1) & MASK)
    x = (x ^ _shifted(x, 30)) * _signed(FIRST_FACTOR)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND_FACTOR)
    return _shifted(x ^ _shifted(x, 31), 11).double() * 2.0**-53


def _mixed(x: int) -> int:
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * FIRST_FACTOR) & MASK
    x = ((x ^ (x >> 27)) * SECOND_FACTOR) & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 with the sign; the mask makes it the unsigned shift of the algorithm.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
