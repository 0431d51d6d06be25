"""Row of the clipped policy objective: the closed form against autograd and against the compiled formula."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.registry import Compiled, Row, register
from fastrl.ops.token_objective import token_objective


def objective_inputs(
    total: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, old_logprob, ref_logprob, advantage and weight [T], in f32 or f64; every tenth token is not trained."""
    generator = torch.Generator().manual_seed(0)
    logprob, advantage = torch.randn(2, total, generator=generator)
    old_logprob = logprob + 0.1 * torch.randn(total, generator=generator)
    ref_logprob = logprob + 0.1 * torch.randn(total, generator=generator)
    weight = (torch.arange(total) % 10 != 0).float()
    inputs = (logprob, old_logprob, ref_logprob, advantage, weight)
    a, b, c, d, e = (x.to(device, torch.promote_types(dtype, torch.float32)) for x in inputs)
    return a, b, c, d, e


def loss_and_derivative(*inputs: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The outputs an optimizer step uses; the masks are booleans, which a tolerance cannot compare."""
    objective = token_objective(*inputs, clip_high=0.28, dual_clip=3.0, kl_coef=0.05, backend=backend)
    return objective.loss, objective.d_logprob


reference = partial(loss_and_derivative, backend="reference")
closed_form = partial(loss_and_derivative, backend="torch")

register(
    Row(
        name="token_objective",
        make_inputs=objective_inputs,
        spec=reference,
        contenders={
            "autograd": reference,
            "torch": closed_form,
            "torch, compiled": Compiled(closed_form, dynamic=True),
            "triton": partial(loss_and_derivative, backend="triton"),
        },
        shapes={"128k tokens": (131072,), "1M tokens": (1048576,)},
        quick_shapes={"4k tokens": (4096,), "32k tokens": (32768,)},
        bytes=lambda n, element: 7.0 * max(element, 4) * n,  # five columns read, loss and derivative written
        differentiable=(0,),
    )
)
