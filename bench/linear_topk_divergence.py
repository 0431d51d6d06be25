"""Row of distillation from 64 stored log-probabilities per token: eager and compiled on N x V logits, and ours."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.linear_logprob import QUICK_VARIANTS, SHAPES, three_products
from bench.registry import Compiled, Row, register
from fastrl.ops.linear_topk_divergence import TopTokens, linear_topk_divergence, reference
from fastrl.testing import linear_logprob_inputs

K = 64


def inputs(
    n: int, d: int, v: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], and a teacher's ids, log-probabilities [N, K] and tail [N]."""
    hidden, weight, first = linear_logprob_inputs(n, d, v, dtype=dtype)
    ids = (first[:, None] + torch.arange(min(K, v - 1))) % v
    logits = torch.randn(n, ids.shape[1] + 1, generator=torch.Generator().manual_seed(1))
    logprob = logits.log_softmax(-1)
    return tuple(x.to(device) for x in (hidden, weight, ids, logprob[:, :-1].contiguous(), logprob[:, -1].contiguous()))  # type: ignore[return-value]


def spec(hidden: Tensor, weight: Tensor, ids: Tensor, logprob: Tensor, tail: Tensor) -> Tensor:
    """Sum of the rows' forward KL over K + 1 outcomes by plain autograd."""
    return reference(hidden, weight, TopTokens(ids, logprob, tail)).loss


def ours(hidden: Tensor, weight: Tensor, ids: Tensor, logprob: Tensor, tail: Tensor, *, backend: str) -> Tensor:
    """The op's loss."""
    return linear_topk_divergence(hidden, weight, TopTokens(ids, logprob, tail), backend=backend).loss


register(
    Row(
        name="linear_topk_divergence",
        make_inputs=inputs,
        spec=spec,
        contenders={
            "eager": spec,
            "eager, compiled": Compiled(spec),
            "torch": partial(ours, backend="torch"),
            "triton": partial(ours, backend="triton"),
        },
        shapes=SHAPES,
        quick_shapes=QUICK_VARIANTS,
        flops=three_products,
        differentiable=(0, 1),
        check_rows=256,
    )
)
