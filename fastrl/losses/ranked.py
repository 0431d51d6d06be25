"""RRHF: several completions of a prompt, ordered by their scores; the likelier one should be the better one."""

from __future__ import annotations

import torch
from torch import Tensor


def rrhf(logprob: Tensor, score: Tensor, group: Tensor) -> Tensor:
    """Hinge over every pair of a prompt's completions whose scores differ.

        loss[i] = sum over j in the group of i with score[j] < score[i] of max(0, logprob[j] - logprob[i])

    RRHF adds the NLL of each group's best completion.

    Args:
        logprob: [S] mean log-probability per completion token, nats; differentiable.
        score: [S] the judge's; a constant. Equal scores make no pair.
        group: [S] int64; completions of one prompt share a number.

    Returns:
        [S] loss of the pairs in which i is the better one; a group's sum is the paper's L_rank of its prompt.

    Cost: O(S^2) numbers, S the completions of a micro-batch.

    Source: Yuan 2023, arXiv:2304.05302, L_rank.
    """
    is_worse = (score[None, :] < score[:, None]) & (group[None, :] == group[:, None])  # [S, S]: j worse than i
    violation = torch.relu(logprob[None, :] - logprob[:, None])
    return torch.where(is_worse, violation, 0.0).sum(1)


def is_best(score: Tensor, group: Tensor) -> Tensor:
    """[S] bool: the first completion of the highest score of each group."""
    same = group[None, :] == group[:, None]
    is_earlier = torch.ones_like(same).tril(-1)
    beats = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & is_earlier)
    return ~(same & beats).any(1)
