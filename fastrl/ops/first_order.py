"""What the backward of every op here says to a second derivative."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
Context = TypeVar("Context")
Gradients = TypeVar("Gradients")
Backward = Callable[Concatenate[Context, P], Gradients]


def first_order(backward: Backward[Context, P, Gradients]) -> Backward[Context, P, Gradients]:
    """A backward that raises under `create_graph=True`, for gradients that are worked out without a graph.

    PyTorch's `once_differentiable` lets the call pass where the upstream gradient is a constant, as that of a loss
    is, and the second derivative then lacks this op's part without a word.

    Raises:
        RuntimeError: where a graph of the gradient is asked for.
    """
    once: Backward[Context, P, Gradients] = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Context, /, *args: P.args, **kwargs: P.kwargs) -> Gradients:
        # A compiler traces the backward with gradients on, and refuses second derivatives by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fastrl's ops have no second derivative, and create_graph=True asks for one: leave it out, or use "
                "backend='reference' or the model's own layers"
            )
        return once(ctx, *args, **kwargs)

    return checked
