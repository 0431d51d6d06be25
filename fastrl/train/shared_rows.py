"""Rows that stand for several positions, laid out for all of them; the way back sums their gradients.

y[t] = x[place[t]]        d x[u] = sum over t with place[t] = u of d y[t], in float32 for 16-bit rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl.types import SharedRows


def spread(x: Tensor, shared: SharedRows) -> Tensor:
    """Lay shared rows out for every position.

    Args:
        x: [U, ...] rows; differentiable.
        shared: which position each one stands for.

    Returns:
        [T, ...].

    Cost: a copy of T rows; backward one of U rows, and the others' in float32. On a GPU the order of that sum, and so
    its last bit, may differ from run to run.
    """
    out: Tensor = _Spread.apply(x, *_columns(shared))
    return out


def _columns(shared: SharedRows) -> tuple[Tensor, ...]:
    return shared.place, shared.kept, shared.others, shared.several, shared.summed


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, *columns: Tensor) -> Tensor:
        ctx.save_for_backward(*columns)
        return x.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, others, several, summed = ctx.saved_tensors
        total = grad.index_select(0, kept)
        own, theirs = total.index_select(0, several), grad.index_select(0, others)
        if grad.dtype in (torch.bfloat16, torch.float16):
            own, theirs = own.float(), theirs.float()
        total.index_copy_(0, several, own.index_add_(0, summed, theirs).to(grad.dtype))
        return total, None, None, None, None, None
