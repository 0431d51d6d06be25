"""A second derivative of an op is refused where the first is asked for, whatever comes from upstream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.ops.first_order import first_order


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert not torch.is_grad_enabled()
        return 2 * x * grad


def test_the_first_derivative_is_as_it_was_and_the_second_is_refused() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    y: Tensor = Square.apply(x)
    assert torch.autograd.grad(y, x, retain_graph=True)[0] == 6
    for upstream in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y, x, upstream, create_graph=True, retain_graph=True)
