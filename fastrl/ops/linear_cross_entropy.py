"""Cross entropy over a linear head in one pass, with label smoothing and z-loss from the same chunk of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_chunk_rows, check_constant, check_head, check_map, check_shapes, check_target
from fastrl.ops.gemm import accumulation_dtype
from fastrl.ops.head import HeadSetting, default_chunk_rows
from fastrl.ops.linear_logprob import reference_logits
from fastrl.ops.linear_token_loss import differentiated_pass
from fastrl.ops.local_head import check_backend, local_head, on_this_rank
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.lora import Lora, adapted
from fastrl.ops.row_kernels import row_kernels
from fastrl.ops.single_pass import Plan
from fastrl.ops.token_stats import RowStats, reference_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_IMPLEMENTATIONS = Implementations("linear_cross_entropy", triton="fastrl.kernels.token_stats")


@_disable_dynamo  # torch.compiler.disable would import the compiler before anybody calls
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of token cross entropies, without N x V logits.

        loss = sum_n token_weight[n] ((1 - eps) -logprob[n] + eps (lse[n] - mean_v z[n, v]) + z_loss lse[n]^2)

    with z, logprob and lse of `linear_logprob`, and eps = label_smoothing.

    Args:
        hidden: [N, D] last hidden states; differentiable.
        weight: [V, D] head, in hidden's dtype; differentiable.
        target: [N] int64. `ignore_index` and negative ids are ignored: they never reach the head.
        token_weight: [N] a constant. None averages over the tokens that are not ignored; the mean of none is 0.
        label_smoothing: eps, share of the target spread evenly over the valid vocabulary. A logit of -inf makes the
            smoothed loss infinite, as it should.
        z_loss: coefficient of lse^2 (PaLM's is 1e-4).
        bias: [V]; differentiable.
        lora: a trained low-rank change of weight, which is usually frozen then: nothing of its size is made.
        temperature: a number, or [N] one per row; a constant.
        softcap: cap on the logits, before the temperature.
        logit_scale: multiplies the logits, before the cap.
        valid_vocab: rows of weight from here on are padding and are no tokens.
        ignore_index: target id of tokens without a loss.
        process_group: ranks that hold the vocabulary together, in equal parts and in the order of ranks; weight and
            bias are this rank's part [V / ranks, ..], targets and valid_vocab still count all tokens, and everything
            else is the same on every rank. All ranks must call. A DTensor cut along dimension 0 by this group will
            do, and its parts may differ in size. None: weight is the whole vocabulary, perhaps a replicated DTensor.
        chunk_rows: rows worked on at a time; None fits a memory budget. Changes rounding only.
        backend: "reference" (N x V numbers, plain autograd), "torch" or "triton" (chunks); None: the machine's best.

    Returns:
        [] float32 (float64 for float64 inputs), differentiable once.

    Cost: as `linear_token_loss`: 6 A D V operations for A tokens that are not ignored.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit.
        RuntimeError: the backend that was asked for cannot run here.

    Source: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, sec. 7; z-loss, Chowdhery et al. 2022,
        arXiv:2204.02311, sec. 5.
    """
    weight, bias, lora, shard = on_this_rank(weight, bias, lora, process_group)
    check_shapes(
        "hidden[N,D] weight[V,D] target[N] bias[V] lora.a[r,D] lora.b[V,r] temperature[N] token_weight[N]",
        {
            "hidden": hidden,
            "weight": weight,
            "target": target,
            "bias": bias,
            "lora.a": None if lora is None else lora.a,
            "lora.b": None if lora is None else lora.b,
            "temperature": temperature if isinstance(temperature, Tensor) else None,
            "token_weight": token_weight,
        },
    )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    vocabulary = weight.shape[0] if shard is None else shard.total
    check_head(hidden, weight, vocabulary, valid_vocab)
    target = target.masked_fill(target == ignore_index, -1)
    check_target(target, valid_vocab or vocabulary)
    check_map(temperature, softcap, logit_scale)
    check_constant("token_weight", token_weight)
    check_chunk_rows(chunk_rows)
    chosen = choose(backend, hidden, _IMPLEMENTATIONS)
    check_backend(chosen, shard)
    row_weight = _row_weight(token_weight, target, accumulation_dtype(hidden))
    logit_map = LogitMap(logit_scale, softcap, temperature)

    def token_loss(stats: RowStats, rows: Tensor) -> Tensor:
        loss = -stats.logprob
        if stats.mean_logit is not None:
            loss = (1 - label_smoothing) * loss + label_smoothing * (stats.lse - stats.mean_logit)
        return loss + z_loss * stats.lse.square() if z_loss else loss

    if chosen == "reference":
        weight, bias = adapted(weight, lora)[:valid_vocab], None if bias is None else bias[:valid_vocab]
        rows = row_weight.nonzero()[:, 0]
        z = reference_logits(hidden[rows], weight, bias, logit_map.rows(rows))
        stats = RowStats(*reference_stats(z, target[rows]), z.mean(-1) if label_smoothing else None)
        return (row_weight[rows] * token_loss(stats, rows)).sum()
    setting = HeadSetting(logit_map, row_kernels(chosen), shard)
    tensors, setting = local_head(weight, bias, lora, setting, valid_vocab)
    size = chunk_rows or default_chunk_rows(hidden.shape[0], setting.widest(tensors), hidden.device)
    plan = Plan(token_loss, row_weight, 0.0, size, with_mean=label_smoothing > 0)
    return differentiated_pass(hidden, tensors, setting, target, plan).loss


def _row_weight(token_weight: Tensor | None, target: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] each token's share of the loss; 0 where the target is negative."""
    is_trained = target >= 0
    if token_weight is not None:
        return token_weight.to(dtype).masked_fill(~is_trained, 0)
    return is_trained.to(dtype) / is_trained.sum().clamp(min=1)
