"""What this processor reaches, measured in seconds of work, as a `fastrl.plan.machine.Machine`.

The cost model needs few numbers: the rate of products of the model's own shapes, of attention and of the elementwise
kernels, the time the head takes on a logit, and the time a small operator takes. Each is the best of a few runs of the
operator itself; none is fitted to a training step, so that a prediction of one is a prediction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from bench.linear_token_loss import policy_inputs, single_pass
from bench.measure import step
from fastrl.ops.layers import gated, layers
from fastrl.plan.machine import Machine
from fastrl.plan.shape import ModelShape
from fastrl.train.native_attention import packed_attention

RUNS = 5
COPIED = 1 << 28  # bytes: out of cache


def measured_machine(
    shape: ModelShape, *, tokens: int, head_rows: int, sequence: int, dtype: torch.dtype, device: str
) -> Machine:
    """The machine as one model sees it.

    Args:
        tokens: of a micro-batch: the rows of the products.
        head_rows: of a micro-batch: those with a loss.
        sequence: tokens of a sequence, for attention.
        dtype: of weights and activations.
    """
    is_native = device == "cpu" and dtype == torch.float32 and find_spec("fastrl._C") is not None
    products = _products(shape, tokens, dtype, device)
    return Machine(
        name=f"this {device}",
        source="measured here, operator by operator",
        peak=products,
        products=products,
        attention=_attention(shape, tokens, sequence, dtype, device, is_native=is_native),
        bandwidth=_bandwidth(device),
        memory=float("inf"),
        launch=_launch(device),
        link=float("inf"),
        network=float("inf"),
        layers=_layers(shape, tokens) if is_native else 0.0,
        logit=_logit(shape, head_rows, products) if device == "cpu" else 0.0,
    )


def _products(shape: ModelShape, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Rate of a layer's products in the order of a step: forward through the projections, d input and d weight back.

    Each output is new memory and no product finds the operands of its last run in cache, as in a step.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = [(shape.hidden, queries), (shape.hidden, keys), (shape.hidden, keys), (queries, shape.hidden)]
    widths += [(shape.hidden, shape.intermediate)] * 2 + [(shape.intermediate, shape.hidden)]
    weights = [torch.randn(outer, inner, device=device).to(dtype) for inner, outer in widths]
    inputs = [torch.randn(tokens, inner, device=device).to(dtype) for inner, _ in widths]
    grads = [torch.randn(tokens, outer, device=device).to(dtype) for _, outer in widths]

    def work() -> None:
        kept = [torch.mm(x, weight.t()) for x, weight in zip(inputs, weights, strict=True)]
        kept += [torch.mm(y, weight) for y, weight in zip(grads, weights, strict=True)]
        kept += [torch.mm(y.t(), x) for x, y in zip(inputs, grads, strict=True)]

    return 6.0 * tokens * sum(inner * outer for inner, outer in widths) / _best(work, device)


def _logit(shape: ModelShape, rows: int, products: float) -> float:
    """Seconds that the head's operator takes for each logit beyond its products at the layers' rate.

    On a CPU the passes over a chunk, new memory and the host's own work for each chunk all count.
    """
    inputs = policy_inputs(rows, shape.hidden, shape.vocab, dtype=torch.float32, device="cpu")
    seconds = _best(step(partial(single_pass, backend="torch"), inputs, (0, 1)), "cpu")
    return max(0.0, seconds - 6.0 * rows * shape.head / products) / (rows * shape.vocab)


def _layers(shape: ModelShape, tokens: int) -> float:
    """Bytes per second of the native layers' elementwise kernels, as the feed-forward's product has it, both ways.

    It reads two tensors and writes one, and backward reads three and writes two; outputs are new memory, as in a step.
    """
    gate, up = (torch.randn(tokens, shape.intermediate).requires_grad_() for _ in range(2))
    ones = torch.ones(tokens, shape.intermediate)
    kernels = layers("native")

    def work() -> None:
        torch.autograd.grad(gated(gate, up, kernels), (gate, up), ones)

    return 8.0 * 4 * tokens * shape.intermediate / _best(work, "cpu")


def _attention(
    shape: ModelShape, tokens: int, sequence: int, dtype: torch.dtype, device: str, *, is_native: bool
) -> float:
    """Rate of causal attention over sequences of one length, forward and backward: 3.5 times the forward's work."""
    count = max(1, tokens // sequence)
    operations = 3.5 * 4.0 * shape.heads * shape.head_dim * count * sequence**2 / 2
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
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * COPIED / _best(lambda: target.copy_(source), device)


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
