"""The functions of `RowKernels` by the Triton kernels, which are imported when first called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.ops.gemm import aligned_rows
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.token_stats import RowGrads, RowStats

if TYPE_CHECKING:
    from fastrl.kernels.logit_map import MapArguments


def stats(raw: Tensor, target: Tensor, logit_map: LogitMap, *, with_mean: bool = False) -> RowStats:
    """One read of raw [C, V], in any float type."""
    from fastrl.kernels import token_stats

    arguments = _arguments(logit_map, torch.promote_types(raw.dtype, torch.float32))
    return RowStats(*token_stats.forward(_readable(raw), target.contiguous(), arguments, with_mean=with_mean).unbind())


def gradient(
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
    """One read and one write, in raw's memory where no rows are left out (on AMD: nor rounded)."""
    from fastrl.kernels import token_gradient

    raw = _readable(raw)
    if out is None and index is None and (raw.dtype == dtype or token_gradient.CAN_NARROW_IN_PLACE):
        out = token_gradient.narrowed(raw, dtype)
    if out is None:
        out = aligned_rows(len(target), raw.shape[1], dtype, raw.device)
    _write_gradient(raw, out, target, stats, grads, logit_map, index=index, is_probability=False)
    return out


def probability(raw: Tensor, lse: Tensor, logit_map: LogitMap, dtype: torch.dtype) -> Tensor:
    """One read and one write."""
    from fastrl.kernels import token_gradient

    out = torch.empty(raw.shape, dtype=dtype, device=raw.device)
    token_gradient.probability(raw, lse.contiguous(), out, _arguments(logit_map, lse.dtype))
    return out


def cached_gradient(
    probability: Tensor,
    target: Tensor,
    stats: RowStats,
    grads: RowGrads,
    logit_map: LogitMap,
    *,
    dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:
    """One read and one write in fresh memory: what was kept must survive for a second backward."""
    out = aligned_rows(len(target), probability.shape[1], dtype, probability.device)
    _write_gradient(probability, out, target, stats, grads, logit_map, index=index, is_probability=True)
    return out


def product_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logit_map: LogitMap,
    *,
    with_mean: bool = False,
) -> RowStats:
    """Statistics out of the product's epilogue; a row's bits do not depend on the other rows."""
    from fastrl.kernels import linear_stats

    found = linear_stats.forward(
        hidden.contiguous(),
        weight.contiguous(),
        bias,
        target.contiguous(),
        _arguments(logit_map, torch.float32),
        with_mean=with_mean,
        tf32=torch.get_float32_matmul_precision() != "highest",
    )
    return RowStats(*found.unbind())


def product_stats_where_faster(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logit_map: LogitMap,
    *,
    with_mean: bool = False,
) -> RowStats | None:
    """`product_stats` where the table or the cost model says so."""
    from fastrl.kernels import tuning

    if not tuning.fuses_statistics(hidden, weight.shape[0]):
        return None
    return product_stats(hidden, weight, bias, target, logit_map, with_mean=with_mean)


def _write_gradient(
    source: Tensor,
    out: Tensor,
    target: Tensor,
    stats: RowStats,
    grads: RowGrads,
    logit_map: LogitMap,
    *,
    index: Tensor | None,
    is_probability: bool,
) -> None:
    from fastrl.kernels import token_gradient

    dtype = stats.lse.dtype
    token_gradient.backward(
        source,
        out,
        index,
        target.contiguous(),
        (stats.logprob.contiguous(), stats.entropy.contiguous(), stats.lse.contiguous()),
        RowGrads(*(None if x is None else x.to(dtype).contiguous() for x in grads)),
        _arguments(logit_map, dtype),
        is_probability=is_probability,
    )


def _arguments(logit_map: LogitMap, dtype: torch.dtype) -> MapArguments:
    from fastrl.kernels.logit_map import map_arguments

    return map_arguments(logit_map.scale, logit_map.softcap, logit_map.temperature, dtype)


def _readable(logits: Tensor) -> Tensor:
    """Logits whose rows lie in one piece each; a copy where they do not."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
