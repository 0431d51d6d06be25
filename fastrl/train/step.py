"""One optimizer step behind the finite-number guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastrl.train.distributed import any_of
from fastrl.train.guards import NonFiniteError, finite, non_finite_cause
from fastrl.train.optimizer import MasterAdamW


@dataclass(frozen=True, slots=True)
class StepResult:
    """What happened to the weights.

    Attributes:
        grad_norm: [] norm before clipping.
        skipped: why the weights were left alone, in words; None when they moved.
    """

    grad_norm: Tensor
    skipped: str | None


def optimizer_step(
    optimizer: MasterAdamW,
    loss: Tensor,
    *,
    lr: float,
    max_grad_norm: float,
    on_nonfinite: Literal["halt", "skip"],
    step: int,
) -> StepResult:
    """Apply the accumulated gradients if they and the loss are finite, then forget them.

    A step that is not finite leaves weights, moments and step counts bit for bit as they were. Ranks decide together.

    Args:
        loss: [] the step's loss, summed over its micro-batches; only looked at.
        on_nonfinite: "halt" raises, "skip" goes on with the next batch.
        step: number of the step, for the message.

    Raises:
        NonFiniteError: something is not finite and `on_nonfinite` is "halt".
    """
    grad_norm = optimizer.grad_norm()
    if not any_of(not finite(loss, grad_norm), "the look at the loss and the gradient norm"):
        optimizer.step(lr, max_grad_norm=max_grad_norm, grad_norm=grad_norm)
        optimizer.zero_grad()
        return StepResult(grad_norm, None)
    cause = non_finite_cause(loss, optimizer.gradients())
    optimizer.zero_grad()
    if on_nonfinite == "halt":
        raise NonFiniteError(
            f"step {step}: {cause}; the weights are those before this step. Resume with a smaller learning_rate, "
            "or pass --on_nonfinite skip to leave such steps out"
        )
    return StepResult(grad_norm, cause)
