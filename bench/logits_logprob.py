"""Row of the statistics of logits that exist already: bound by memory traffic, not by arithmetic."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.registry import Compiled, Row, register
from fastrl.ops.logits_logprob import logits_logprob, reference


def logits_inputs(n: int, v: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """logits [N, V] of standard deviation 3 and target [N]."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, v, generator=generator)
    return logits.to(device, dtype), torch.randint(v, (n,), generator=generator).to(device)


register(
    Row(
        name="logits_logprob",
        make_inputs=logits_inputs,
        spec=reference,
        contenders={
            "eager": reference,
            "eager, compiled": Compiled(reference),
            "torch": partial(logits_logprob, backend="torch"),
            "triton": partial(logits_logprob, backend="triton"),
        },
        shapes={"8k x 151936": (8192, 151936), "8k x 50257": (8192, 50257)},
        quick_shapes={"gpt2": (128, 50257)},
        bytes=lambda n, v, element: 3.0 * element * n * v,  # read; read and written by the gradient
        check_rows=256,
    )
)
