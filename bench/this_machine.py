"""What this processor reaches, measured in seconds of work, as a `fastrl.plan.machine.Machine`.

The cost model needs few numbers: the rate of products of the model's own shapes, of attention, the speed of copies,
and the time a small operator takes. Each is the best of a few runs of the operator itself; none is fitted to a
training step, so that a prediction of one is a prediction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from fastrl.plan.machine import Machine
from fastrl.plan.shape import ModelShape
from fastrl.train.native_attention import packed_attention

RUNS = 5
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes: out of cache


def measured_machine(shape: ModelShape, *, tokens: int, sequence: int, dtype: torch.dtype, device: str) -> Machine:
    """The machine as one model sees it.

    Args:
        tokens: of a micro-batch: the rows of the products.
        sequence: tokens of a sequence, for attention.
        dtype: of weights and activations.
    """
    products = _products(shape, tokens, dtype, device)
    return Machine(
        name=f"this {device}",
        source="measured here, operator by operator",
        peak=products,
        products=products,
        attention=_attention(shape, tokens, sequence, dtype, device),
        bandwidth=_bandwidth(device),
        memory=float("inf"),
        launch=_launch(device),
        link=float("inf"),
        network=float("inf"),
    )


def _products(shape: ModelShape, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Rate of the feed-forward layer's three kinds of product: forward, d input and d weight."""
    x = torch.randn(tokens, shape.hidden, device=device).to(dtype)
    weight = torch.randn(shape.intermediate, shape.hidden, device=device).to(dtype)
    y = x @ weight.t()

    def work() -> None:
        torch.mm(x, weight.t())
        torch.mm(y, weight)
        torch.mm(y.t(), x)

    return 6.0 * tokens * shape.hidden * shape.intermediate / _best(work, device)


def _attention(shape: ModelShape, tokens: int, sequence: int, dtype: torch.dtype, device: str) -> float:
    """Rate of causal attention over sequences of one length, forward and backward: 3.5 times the forward's work."""
    count = max(1, tokens // sequence)
    operations = 3.5 * 4.0 * shape.heads * shape.head_dim * count * sequence**2 / 2
    is_native = device == "cpu" and dtype == torch.float32 and find_spec("fastrl._C") is not None
    leading = (count * sequence,) if is_native else (count, sequence)
    q, k, v = (
        torch.randn(*leading, heads, shape.head_dim, device=device).to(dtype).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    borders = torch.arange(0, count * sequence + 1, sequence, dtype=torch.int32, device=device)

    def work() -> None:
        if is_native:
            out = packed_attention(q, k, v, borders, scaling=shape.head_dim**-0.5)
        else:
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out.sum(), (q, k, v))

    return operations / _best(work, device)


def _bandwidth(device: str) -> float:
    """Bytes read and written by a copy out of cache."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * COPIED[device] / _best(lambda: target.copy_(source), device)


def _launch(device: str) -> float:
    """Seconds of an operator that does next to nothing."""
    x = torch.zeros(16, device=device)

    def work() -> None:
        for _ in range(1000):
            x.add_(1.0)

    return _best(work, device) / 1000


def _best(work: Callable[[], object], device: str) -> float:
    """Shortest of a few runs after one that warms up."""
    times = []
    for _ in range(RUNS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
