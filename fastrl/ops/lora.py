"""A low-rank change of the head, trained without a gradient, or a copy, of the head's own size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lora:
    """The logits get scale (hidden a^T) b^T more: weight + scale b a, without that matrix.

    Attributes:
        a: [r, D] in any float dtype (adapters are often float32 beside a bfloat16 head); differentiable. Products use
            hidden's dtype.
        b: [V, r]; differentiable.
        scale: alpha / r.

    Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


def adapted(weight: Tensor, lora: Lora | None) -> Tensor:
    """The specification: weight + scale b a [V, D] in weight's dtype."""
    return weight if lora is None else weight + (lora.scale * lora.b @ lora.a).to(weight.dtype)
