"""Liger's distillation: the generalised Jensen-Shannon divergence to a teacher's head, with the labels' NLL."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.integrations.liger.head import operands, read_target
from fastrl.ops import linear_divergence


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """`loss(student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias)`.

        loss = mean over tokens that are not ignored of
               weight_hard_loss nll (at temperature 1) + weight_soft_loss D_beta(teacher, student) (at `temperature`)

    Returns the loss, or `(loss, soft, hard)` with return_soft_hard_loss, of which only the first has a gradient.
    `compiled` and `chunk_size` are accepted, kept as attributes, and change no number here. Heads of different sizes
    are refused: Liger fills the student's missing logits with zeros, which gives tokens it cannot say probability.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if weight_hard_loss < 0 or weight_soft_loss < 0:
            raise ValueError(f"weights must not be negative, got {weight_hard_loss} and {weight_soft_loss}")
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature, self.compiled = ignore_index, temperature, compiled
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """As in the class."""
        if len(student_weight) != len(teacher_weight):
            raise ValueError(
                f"student and teacher must share one vocabulary, got {len(student_weight)} and {len(teacher_weight)} "
                "rows: cut the padding off the longer head"
            )
        student = operands(student_input, student_weight, student_bias)
        teacher = operands(teacher_input, teacher_weight, teacher_bias)
        is_read = true_labels.flatten() != self.ignore_index
        share = is_read.float() / is_read.sum().clamp(min=1)
        total = self.weight_hard_loss + self.weight_soft_loss
        found = linear_divergence(
            student.hidden,
            student.weight,
            teacher.hidden,
            teacher.weight,
            beta=self.beta,
            target=read_target(true_labels.flatten(), is_read, len(student.weight)),
            alpha=self.weight_hard_loss / total if total else 0.0,
            bias=student.bias,
            teacher_bias=teacher.bias,
            temperature=self.temperature,
            row_weight=total * share,
        )
        if not self.return_soft_hard_loss:
            return found.loss
        assert found.stats is not None
        # At total 0 no row reaches the heads, and both parts are shown as 0.
        return found.loss, (share * found.divergence).sum(), -(share * found.stats.logprob).sum()
