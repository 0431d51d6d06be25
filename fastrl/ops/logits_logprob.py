"""The waist's statistics when logits exist already; besides the logits only their gradient is N x V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_chunk_rows, check_map, check_shapes, check_target, check_vocab
from fastrl.ops.first_order import first_order
from fastrl.ops.gemm import accumulation_dtype
from fastrl.ops.head import chunks, default_chunk_rows
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.row_kernels import RowKernels, row_kernels
from fastrl.ops.token_stats import RowGrads, RowStats, TokenStats, reference_stats

_IMPLEMENTATIONS = Implementations("logits_logprob", triton="fastrl.kernels.token_stats")


def logits_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-probability of each target, entropy and log-sum-exp of its distribution, from logits.

        z = softcap(logit_scale logits) / temperature;  the rest as in `linear_logprob`

    Args:
        logits: [N, V]; differentiable. -inf forbids a token.
        target: [N] int64. A negative one is ignored: logprob 0 without gradient, entropy and lse as ever.
        temperature: divides the capped logits; a number, or [N] one per row; a constant.
        softcap: c in c tanh(z / c), before the temperature; None caps nothing.
        logit_scale: multiplies the logits, before the cap.
        valid_vocab: logits from here on belong to padding and to no token.
        chunk_rows: rows worked on at a time; None fits a memory budget.
        backend: "reference" (plain autograd), "torch" or "triton" (chunks); None: the machine's best.

    Returns:
        TokenStats of [N] float32 (float64 for float64 logits), each differentiable once.

    Cost: reads the logits once in forward and once in backward, which writes their gradient in their dtype; besides
        it three chunks of float32.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit (target ids are range-checked on CPU only).
        RuntimeError: the backend that was asked for cannot run here.
    """
    check_shapes(
        "logits[N,V] target[N] temperature[N]",
        {
            "logits": logits,
            "target": target,
            "temperature": temperature if isinstance(temperature, Tensor) else None,
        },
    )
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    check_vocab(logits.shape[1], valid_vocab)
    check_target(target, valid_vocab or logits.shape[1])
    check_map(temperature, softcap, logit_scale)
    check_chunk_rows(chunk_rows)
    chosen = choose(backend, logits, _IMPLEMENTATIONS)
    logits = logits if valid_vocab is None else logits[:, :valid_vocab]
    logit_map = LogitMap(logit_scale, softcap, temperature)
    if chosen == "reference":
        return reference_stats(logit_map.apply(logits.to(accumulation_dtype(logits))), target)
    size = chunk_rows or default_chunk_rows(logits.shape[0], logits.shape[1], logits.device)
    return TokenStats(*_LogitsLogprob.apply(logits, target, logit_map, size, row_kernels(chosen)))


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> TokenStats:
    """What `logits_logprob` means: plain differentiable PyTorch, without checks."""
    raw = logits[:, :valid_vocab].to(accumulation_dtype(logits))
    return reference_stats(LogitMap(logit_scale, softcap, temperature).apply(raw), target)


class _LogitsLogprob(torch.autograd.Function):
    """Keeps the caller's logits and [N] statistics; backward works out each chunk's probabilities again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, logit_map: LogitMap, size: int, kernels: RowKernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats = logits.new_empty((3, logits.shape[0]), dtype=accumulation_dtype(logits))
        for rows in chunks(logits.shape[0], size):
            of_rows = kernels.stats(logits[rows], target[rows], logit_map.rows(rows))
            stats[:, rows] = torch.stack(of_rows[:3])
        logprob, entropy, lse = stats.unbind()
        ctx.save_for_backward(logits, target, logit_map.row_temperature, stats)
        ctx.logit_map, ctx.size, ctx.kernels = logit_map, size, kernels
        ctx.set_materialize_grads(False)
        return logprob.clone(), entropy.clone(), lse.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, _, stats = ctx.saved_tensors
        of_all, grads = RowStats(*stats.unbind()), RowGrads(*upstream)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in chunks(logits.shape[0], ctx.size):
            of_rows = (target[rows], of_all.rows(rows), grads.rows(rows), ctx.logit_map.rows(rows))
            ctx.kernels.gradient(logits[rows], *of_rows, dtype=gradient.dtype, out=gradient[rows])
        return gradient, None, None, None, None
