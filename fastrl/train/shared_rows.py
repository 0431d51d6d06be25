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

    Cost: a copy; backward another in the precision of the sum. On a GPU the order of that sum, and so its last bit, may
    differ from run to run.
    """
    out: Tensor = _Spread.apply(x, shared.place)
    return out


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = len(x)
        return x.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        wide = grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad
        total = wide.new_zeros(ctx.rows, *grad.shape[1:]).index_add_(0, place, wide)
        return total.to(grad.dtype), None
