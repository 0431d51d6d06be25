"""How tokens are averaged: `(length [S], group [S]) -> [S]`, the weight of each trained token of each sequence.

The lengths are those of the whole optimizer step, over all micro-batches and ranks, known before the first forward
pass. A sequence of length 0 is not there: weight 0, and it counts in no denominator. The loss is then always
`(weight * token_loss).sum()`, which adds up whatever the cut. Weights are computed in f64, returned in f32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]


def token_mean(length: Tensor, group: Tensor) -> Tensor:
    """Every token of the step counts the same: 1 / sum n. Source: DAPO as implemented; TRL's and verl's default."""
    return _where_trained(length, torch.ones_like(length, dtype=torch.float64) / length.sum())


def sequence_mean(length: Tensor, group: Tensor) -> Tensor:
    """Every sequence counts the same, its tokens share it: 1 / (S n_s). Source: GRPO, arXiv:2402.03300, eq. 3."""
    return _where_trained(length, 1 / (_present(length) * length.double()))


def sequence_sum(length: Tensor, group: Tensor) -> Tensor:
    """A sequence counts by its length: 1 / S. Source: RLOO, arXiv:2402.14740; LUSPO, arXiv:2602.05261."""
    return _where_trained(length, (1 / _present(length)).expand(length.shape))


def fixed_length(lengths: Tensor, group: Tensor, *, length: int) -> Tensor:
    """Dr. GRPO: as `sequence_sum` over a constant, 1 / (S length), so that no token's weight depends on its sequence.

    Args:
        lengths: [S] trained tokens.
        group: [S] not read.
        length: the constant, usually the most tokens a completion may have.

    Source: Liu 2025, arXiv:2503.20783, sec. 3.2.
    """
    return _where_trained(lengths, (1 / (_present(lengths) * length)).expand(lengths.shape))


def prompt_mean(length: Tensor, group: Tensor) -> Tensor:
    """Every prompt counts the same, the tokens of its completions share it: 1 / (P sum of n over the group).

    Source: DAPO as written, arXiv:2503.14476, eq. 8 (the sum is inside the expectation over prompts); ScaleRL,
    arXiv:2510.13786.
    """
    segment = group.unique(return_inverse=True)[1]
    total = torch.zeros(len(length), dtype=torch.float64, device=length.device)
    total = total.index_add(0, segment, length.double())
    return _where_trained(length, 1 / ((total > 0).sum() * total[segment]))


def without(weighting: Weighting, length: Tensor, group: Tensor, kept: Tensor, *, keep_denominator: bool) -> Tensor:
    """A weighting where some sequences (overlong, truncated, failed) leave the loss.

    Args:
        weighting: any of the above.
        length: [S] trained tokens, those of the masked sequences included.
        group: [S] int64.
        kept: [S] bool, False for a sequence that leaves.
        keep_denominator: True divides as if the masked sequences were there (TRL: the others keep their weight);
            False divides by what is left (verl: the others share the whole).

    Returns:
        [S] f32; 0 where not kept.
    """
    if keep_denominator:
        return torch.where(kept, weighting(length, group), 0.0)
    return weighting(torch.where(kept, length, 0), group)


def _present(length: Tensor) -> Tensor:
    """[] f64: how many sequences have a trained token."""
    return (length > 0).sum().double()


def _where_trained(length: Tensor, weight: Tensor) -> Tensor:
    # Chosen, not multiplied: a weight computed for an empty sequence or step is 1 / 0.
    return torch.where(length > 0, weight, 0.0).float()
