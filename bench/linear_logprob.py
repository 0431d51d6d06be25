"""Rows of the waist: log-probability, entropy and log-sum-exp of tokens, forward and backward."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from bench.peers import bare_products, trl_logprob, verl_logprob
from bench.registry import Compiled, Row, register
from fastrl.ops.linear_logprob import linear_logprob, reference
from fastrl.testing import linear_logprob_inputs

SHAPES = {  # N, D, V
    "qwen3-0.6b": (8192, 1024, 151936),
    "qwen3-1.7b": (8192, 2048, 151936),
    "qwen2.5-7b": (8192, 3584, 152064),
    "llama3-8b": (8192, 4096, 128256),
    "qwen3-8b": (8192, 4096, 151936),
    "qwen3-8b, odd N": (1937, 4096, 151936),
    "qwen3-1.7b, 32k": (32768, 2048, 151936),
}
QUICK_SHAPES = {"demo": (2000, 128, 100), "gpt2 head": (256, 256, 50257)}
# Of rows that vary one of these: a vocabulary that takes a tenth of a second in place of a half.
QUICK_VARIANTS = {"8k words": (512, 256, 8192)}


def three_products(n: int, d: int, v: int) -> float:
    """Logits, d hidden and d weight: the work no implementation can leave out."""
    return 6.0 * n * d * v


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of N x V logits: what trainers ask for."""
    stats = reference(hidden, weight, target)
    return stats.logprob, stats.entropy


def waist(
    hidden: Tensor, weight: Tensor, target: Tensor, *, backend: str, cache_gib: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same from `linear_logprob`."""
    stats = linear_logprob(hidden, weight, target, backend=backend, cache_gib=cache_gib)
    return stats.logprob, stats.entropy


register(
    Row(
        name="linear_logprob",
        make_inputs=linear_logprob_inputs,
        spec=eager,
        contenders={
            "eager": eager,
            "eager, compiled": Compiled(eager),
            "torch": partial(waist, backend="torch"),
            "torch, no cache": partial(waist, backend="torch", cache_gib=0.0),
            "torch, 2.5 GiB cache": partial(waist, backend="torch", cache_gib=2.5),
            "triton": partial(waist, backend="triton"),
            "TRL's head": trl_logprob,
            "verl's head": verl_logprob,
        },
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        flops=three_products,
        floor=bare_products,
        check_rows=256,
    )
)
