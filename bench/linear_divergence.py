"""Row of distillation over two heads: eager and compiled on N x V logits, and ours."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.registry import Compiled, Row, register
from fastrl.ops.linear_divergence import linear_divergence, reference

BETA = 0.5


def inputs(
    n: int, d: int, v: int, e: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], teacher_hidden [N, E], teacher_weight [V, E]; logits of about unit variance."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, d, 1.0), (v, d, d**-0.5), (n, e, 1.0), (v, e, e**-0.5))
    made = (scale * torch.randn(rows, columns, generator=generator) for rows, columns, scale in shapes)
    hidden, weight, teacher_hidden, teacher_weight = (x.to(device, dtype) for x in made)
    return hidden, weight, teacher_hidden, teacher_weight


def spec(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Sum of the rows' generalised Jensen-Shannon divergences by plain autograd."""
    return reference(hidden, weight, teacher_hidden, teacher_weight, beta=BETA).loss


def ours(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, backend: str) -> Tensor:
    """The op's loss."""
    return linear_divergence(hidden, weight, teacher_hidden, teacher_weight, beta=BETA, backend=backend).loss


register(
    Row(
        name="linear_divergence",
        make_inputs=inputs,
        spec=spec,
        contenders={
            "eager": spec,
            "eager, compiled": Compiled(spec),
            "torch": partial(ours, backend="torch"),
            "triton": partial(ours, backend="triton"),
        },
        shapes={"qwen3-0.6b from 8b": (4096, 1024, 151936, 4096), "llama3-1b from 8b": (4096, 2048, 128256, 4096)},
        quick_shapes={"8k words": (512, 64, 8192, 128)},
        flops=lambda n, d, v, e: n * v * (6 * d + 2 * e),
        differentiable=(0, 1),
        check_rows=256,
    )
)
