"""Row of cross entropy over a head: eager, compiled, torch's own chunked function where it exists, and ours."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.linear_logprob import QUICK_SHAPES, SHAPES, three_products
from bench.peers import bare_products, cce, liger_cross_entropy
from bench.registry import Compiled, Row, register
from fastrl.ops.linear_cross_entropy import linear_cross_entropy
from fastrl.testing import linear_logprob_inputs


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of N x V logits, upcast as Hugging Face models do."""
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def torch_own(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (torch >= 2.13) with its default, chunked options."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise RuntimeError("needs torch.nn.functional.linear_cross_entropy of torch 2.13")
    loss: Tensor = functional.linear_cross_entropy(hidden, weight, target)
    return loss


register(
    Row(
        name="linear_cross_entropy",
        make_inputs=linear_logprob_inputs,
        spec=eager,
        contenders={
            "eager": eager,
            "eager, compiled": Compiled(eager),
            "torch's own": torch_own,
            "torch": partial(linear_cross_entropy, backend="torch"),
            "triton": partial(linear_cross_entropy, backend="triton"),
            "Liger": liger_cross_entropy,
            "CCE": cce(filter_eps="high"),
            "CCE, no filter": cce(filter_eps=None),
        },
        floor=bare_products,
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        flops=three_products,
        check_rows=256,
    )
)
