"""Rows of the waist: log-probability, entropy and log-sum-exp of tokens, forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from bench.registry import Row, register
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
QUICK_SHAPES = {
    "demo": (2000, 128, 100),
    "bytes": (2048, 256, 257),
    "gpt2 head": (512, 256, 50257),
}


def three_products(n: int, d: int, v: int) -> float:
    """Logits, d hidden and d weight: the work no implementation can leave out."""
    return 6.0 * n * d * v


register(
    Row(
        name="linear_logprob",
        make_inputs=linear_logprob_inputs,
        spec=reference,
        contenders={
            "eager": reference,
            "eager, compiled": torch.compile(reference, dynamic=False),
            "torch": partial(linear_logprob, backend="torch"),
            "torch, no cache": partial(linear_logprob, backend="torch", cache_gib=0.0),
            "torch, 2.5 GiB cache": partial(linear_logprob, backend="torch", cache_gib=2.5),
            "triton": partial(linear_logprob, backend="triton"),
        },
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        flops=three_products,
        check_rows=256,
    )
)
