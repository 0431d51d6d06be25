"""Megatron's accumulation buffer `weight.main_grad`: d weight is added to it, and autograd sees none.

The convention is Megatron-LM's gradient accumulation fusion: a parameter that carries a `main_grad` takes its sum there
in the buffer's precision; one that carries a `grad_added_to_main_grad` too has it set and gets a gradient of zeros, so
that its hooks run. Without that attribute the gradient is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MainGrad:
    """A parameter and where the gradient of its first rows goes.

    Attributes:
        parameter: the head's weight.
        buffer: [V, D] the rows of `parameter.main_grad` that belong to the valid vocabulary; changed in place.
    """

    parameter: Tensor
    buffer: Tensor

    def taken(self, gradient: Tensor, scale: Tensor | None = None) -> Tensor | None:
        """Add scale x gradient [V, D] to the buffer, unless it was summed there, and return what autograd shall see."""
        if scale is not None and gradient.dtype == self.buffer.dtype == scale.dtype:
            self.buffer.addcmul_(gradient, scale)
        elif gradient is not self.buffer:
            self.buffer.add_(gradient if scale is None else gradient * scale)
        if not hasattr(self.parameter, "grad_added_to_main_grad"):
            return None
        self.parameter.grad_added_to_main_grad = True
        return self.parameter.new_zeros(()).expand(self.buffer.shape)


def main_grad_of(weight: Tensor, rows: int | None) -> MainGrad | None:
    """The buffer of the first `rows` rows; None when the weight has none.

    Raises:
        ValueError: a buffer of another shape.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return None
    if buffer.shape != weight.shape:
        raise ValueError(f"weight.main_grad must be {list(weight.shape)} as weight is, got shape {tuple(buffer.shape)}")
    return MainGrad(weight, buffer[:rows])
