"""What Liger's losses ask of a head: operands of one dtype, log-probabilities of sequences, means of all logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ops import linear_logprob


class Operands(NamedTuple):
    """Rows of a linear head in one dtype."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
    """Flatten hidden [.., D] to rows and cast all to autocast's dtype, or weight and bias to hidden's."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = hidden.reshape(-1, hidden.shape[-1])
    return Operands(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def read_target(target: Tensor, is_read: Tensor, vocabulary: int) -> Tensor:
    """Ids for the ops: -1, which they ignore, where not `is_read`; negative ids elsewhere are refused, not ignored.

    Raises:
        ValueError: a negative id, on a CPU. On a GPU, where a look would stall it, that is an id out of range.
    """
    is_wrong = is_read & (target < 0)
    if target.device.type == "cpu" and bool(is_wrong.any()):
        raise ValueError(f"target holds {int(target[is_wrong][0])}, which is neither a token nor the id to ignore")
    return target.masked_fill(~is_read, -1).masked_fill(is_wrong, vocabulary)


def token_logprob(
    head: Operands, target: Tensor, is_read: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Log-probabilities of `target`, in its shape, 0 where not `is_read`: those rows never reach the head.

    Args:
        head: of target's N tokens, in their order.
        target: [..] int64 ids, N in all; any number where not is_read.
        is_read: bool, as target.
        temperature: divides the logits.
        softcap: see `fastrl.ops.linear_logprob`.

    Returns:
        float32, nats; differentiable by the head.

    Raises:
        ValueError: another number of rows than of tokens, or see `read_target`.
    """
    if len(head.hidden) != target.numel():
        raise ValueError(f"{len(head.hidden)} hidden states for {target.numel()} tokens of shape {tuple(target.shape)}")
    rows = is_read.flatten().nonzero()[:, 0]
    found = linear_logprob(
        head.hidden[rows],
        head.weight,
        read_target(target, is_read, len(head.weight)).flatten()[rows],
        bias=head.bias,
        temperature=temperature,
        softcap=softcap,
    ).logprob
    return found.new_zeros(target.numel()).index_copy(0, rows, found).reshape(target.shape)


def sequence_logprob(head: Operands, target: Tensor, *, ignore_index: int, average: bool) -> Tensor:
    """[B] sum or mean of log-probabilities over the tokens of target [B, T] that are not ignored; NaN for none's mean.

    Differentiable by the head.
    """
    is_read = target != ignore_index
    total = token_logprob(head, target, is_read).sum(-1)
    return total / is_read.sum(-1) if average else total


@torch.no_grad()
def logit_sum(head: Operands, sequences: int) -> Tensor:
    """[B] sum of every logit of every token, without logits: sum_t h_t . sum_v w_v + T sum_v b_v, in float32."""
    weight = head.weight.float().sum(0)
    hidden = head.hidden.float().reshape(sequences, -1, head.hidden.shape[-1])
    total = hidden.sum(1) @ weight
    return total if head.bias is None else total + hidden.shape[1] * head.bias.float().sum()
