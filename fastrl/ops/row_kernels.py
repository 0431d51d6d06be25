"""What a backend does to a chunk of logits: the few functions that the chunk loops call. The loops exist once.

Products of a head are torch's in every backend (`fastrl.ops.gemm`), but for `product_stats`, which makes statistics
without logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.ops import triton_rows
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.token_stats import RowGrads, RowStats, cached_gradient, row_gradient_, row_stats


@dataclass(frozen=True, slots=True)
class RowKernels:
    """The functions of one backend; RowStats and RowGrads are float32 (float64 for float64 logits).

    Attributes:
        stats: (raw [C, V], target [C], logit_map, *, with_mean) -> RowStats; raw survives.
        gradient: (raw [C, V], target [K], stats [K], grads [K], logit_map, *, dtype, index, out) -> d raw [K, V].
            `index` [K] are the rows of raw that are meant, None all of them. The result is `out` when it is given,
            and raw survives then; else it has `dtype` and may lie in raw's memory.
        probability: (raw [C, V], lse [C], logit_map, dtype) -> softmax [C, V]; raw may be overwritten.
        cached_gradient: as `gradient`, from what `probability` made, which survives; no cap.
        product_stats: (hidden [C, D], weight [V, D], bias, target [C], logit_map, *, with_mean) -> RowStats without
            logits in memory, or None where logits are the faster way.
    """

    stats: Callable[..., RowStats]
    gradient: Callable[..., Tensor]
    probability: Callable[[Tensor, Tensor, LogitMap, torch.dtype], Tensor]
    cached_gradient: Callable[..., Tensor]
    product_stats: Callable[..., RowStats | None]


def row_kernels(backend: str, *, batch_invariant: bool = False) -> RowKernels:
    """The functions of a backend that `choose` returned.

    Args:
        backend: "torch" or "triton".
        batch_invariant: never leave the statistics to a product whose sums depend on the number of rows.

    Raises:
        RuntimeError: batch_invariant on a backend whose products are all the vendor's.
    """
    if backend == "triton":
        return replace(TRITON, product_stats=triton_rows.product_stats) if batch_invariant else TRITON
    if batch_invariant:
        raise RuntimeError(f"batch_invariant needs backend 'triton', got {backend!r}: its products have fixed tiles")
    return TORCH


def _torch_gradient(
    raw: Tensor,
    target: Tensor,
    stats: RowStats,
    grads: RowGrads,
    logit_map: LogitMap,
    *,
    dtype: torch.dtype,
    index: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if index is not None:
        raw = raw[index]
    elif out is not None:
        raw = raw.to(stats.lse.dtype, copy=True)
    gradient = row_gradient_(raw.to(stats.lse.dtype), target, stats, grads, logit_map)
    return gradient.to(dtype) if out is None else out.copy_(gradient)


def _torch_probability(raw: Tensor, lse: Tensor, logit_map: LogitMap, dtype: torch.dtype) -> Tensor:
    return logit_map.apply(raw).sub_(lse[:, None]).exp_().to(dtype)


def _torch_cached_gradient(
    probability: Tensor,
    target: Tensor,
    stats: RowStats,
    grads: RowGrads,
    logit_map: LogitMap,
    *,
    dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:
    kept = probability if index is None else probability[index]
    return cached_gradient(kept, target, stats, grads, logit_map).to(dtype)


def _no_product_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logit_map: LogitMap,
    *,
    with_mean: bool = False,
) -> None:
    """Torch has no product that reduces its own tiles."""


TORCH = RowKernels(row_stats, _torch_gradient, _torch_probability, _torch_cached_gradient, _no_product_stats)
TRITON = RowKernels(
    triton_rows.stats,
    triton_rows.gradient,
    triton_rows.probability,
    triton_rows.cached_gradient,
    triton_rows.product_stats_where_faster,
)
