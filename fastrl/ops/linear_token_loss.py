"""A per-token loss and its gradients in one pass over a linear head: 6 N D V operations, chunk x V memory.

The loss is the caller's ordinary PyTorch on log-probability and entropy; no loss needs a head kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_chunk_rows, check_constant, check_head, check_map, check_shapes, check_target
from fastrl.ops.first_order import first_order
from fastrl.ops.gemm import accumulation_dtype
from fastrl.ops.head import HeadSetting, HeadTensors, Needs, default_chunk_rows
from fastrl.ops.linear_logprob import reference_logits
from fastrl.ops.local_head import check_backend, local_head, on_this_rank
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.lora import Lora, adapted
from fastrl.ops.row_kernels import row_kernels
from fastrl.ops.single_pass import Plan, single_pass
from fastrl.ops.token_stats import TokenStats, reference_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# logprob [C], entropy [C], rows [C] int64 -> loss [C]
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

_IMPLEMENTATIONS = Implementations("linear_token_loss", triton="fastrl.kernels.token_stats")


class TokenLoss(NamedTuple):
    """A weighted sum of per-token losses, and what it was made of.

    Attributes:
        loss: [] differentiable.
        stats: [N] each, detached; 0 in rows whose weight is 0, which never reach the head.
        skipped_bound: [] upper bound of sum |d loss / d logits| left out because of skip_tolerance.
    """

    loss: Tensor
    stats: TokenStats
    skipped_bound: Tensor


@_disable_dynamo  # torch.compiler.disable would import the compiler before anybody calls
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: LossFunction,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    row_weight: Tensor | None = None,
    skip_tolerance: float = 0.0,
    process_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> TokenLoss:
    """Sum a per-token loss over a linear head, differentiated inside the chunk loop.

        loss = sum_n row_weight[n] loss_fn(logprob, entropy, rows)[n]

    with logprob and entropy of `linear_logprob`. `loss_fn` sees C rows at a time, in any partition, so its value for
    a row may use nothing of other rows; what couples rows (token counts, group sizes) belongs into row_weight.

    Args:
        hidden: [N, D] last hidden states; differentiable.
        weight: [V, D] head, in hidden's dtype; differentiable.
        target: [N] int64. A negative one is ignored: logprob 0 without gradient.
        loss_fn: logprob [C], entropy [C], rows [C] int64 (places in the N rows, to index constants with) ->
            loss [C]. Tensors it closes over must not require grad. A constant gives no gradient.
        bias: [V]; differentiable.
        lora: a trained low-rank change of weight, which is usually frozen then: nothing of its size is made.
        temperature: a number, or [N] one per row; a constant.
        softcap: cap on the logits, before the temperature.
        logit_scale: multiplies the logits, before the cap.
        valid_vocab: rows of weight from here on are padding and are no tokens.
        row_weight: [N] a constant; rows of weight 0 never reach the head. None weighs every row 1.
        skip_tolerance: leave the rows with the smallest gradients out of the gradient products while the sum of
            their bounds stays within this share of their chunk's. A row's bound of sum_v |d loss / d logit_v| is
            (2 |d logprob| (1 - p) + 2 |d entropy| entropy) |logit_scale| / temperature. 0 leaves out zeros only.
        process_group: ranks that hold the vocabulary together, in equal parts and in the order of ranks; weight and
            bias are this rank's part [V / ranks, ..], targets and valid_vocab still count all tokens, and everything
            else is the same on every rank. All ranks must call. A DTensor cut along dimension 0 by this group will
            do, and its parts may differ in size. None: weight is the whole vocabulary, perhaps a replicated DTensor.
        chunk_rows: rows worked on at a time; None fits a memory budget. Changes rounding only.
        backend: "reference" (N x V numbers, plain autograd), "torch" or "triton" (chunks); None: the machine's best.

    Returns:
        TokenLoss. The loss is float32 (float64 for float64 inputs).

    Gradient: made in forward, multiplied by grad_output out of place in backward, so a second backward
        (retain_graph), a GradScaler and accumulation see the same numbers. Differentiable once. Where weight carries
        a `main_grad` (Megatron's), that product is added there and weight gets None (`fastrl.ops.main_grad`). In a
        compiled step the call breaks the graph once.

    Cost: 6 A D V operations for A rows with a weight, less 4 D V for each row without coefficients and 2 N D V for a
        frozen head or frozen hidden states; 2 A D V when no gradient is wanted. Memory: three chunks of float32
        logits (four with a cap) and a float32 [V, D].

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, or a loss_fn that closes over trainable tensors.
        RuntimeError: the backend that was asked for cannot run here.
    """
    weight, bias, lora, shard = on_this_rank(weight, bias, lora, process_group)
    check_shapes(
        "hidden[N,D] weight[V,D] target[N] bias[V] lora.a[r,D] lora.b[V,r] temperature[N] row_weight[N]",
        {
            "hidden": hidden,
            "weight": weight,
            "target": target,
            "bias": bias,
            "lora.a": None if lora is None else lora.a,
            "lora.b": None if lora is None else lora.b,
            "temperature": temperature if isinstance(temperature, Tensor) else None,
            "row_weight": row_weight,
        },
    )
    vocabulary = weight.shape[0] if shard is None else shard.total
    check_head(hidden, weight, vocabulary, valid_vocab)
    check_target(target, valid_vocab or vocabulary)
    check_map(temperature, softcap, logit_scale)
    check_constant("row_weight", row_weight)
    check_chunk_rows(chunk_rows)
    if not 0 <= skip_tolerance < 1:
        raise ValueError(f"skip_tolerance must be in [0, 1), got {skip_tolerance}")
    chosen = choose(backend, hidden, _IMPLEMENTATIONS)
    check_backend(chosen, shard)
    if chosen == "reference":
        return reference(
            hidden,
            weight,
            target,
            loss_fn,
            bias=bias,
            lora=lora,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            valid_vocab=valid_vocab,
            row_weight=row_weight,
        )
    setting = HeadSetting(
        LogitMap(logit_scale, softcap, temperature), row_kernels(chosen), shard, 1.0 if lora is None else lora.scale
    )
    tensors, setting = local_head(weight, bias, lora, setting, valid_vocab)
    plan = Plan(
        chunk_loss=lambda stats, rows: loss_fn(stats.logprob, stats.entropy, rows),
        row_weight=None if row_weight is None else row_weight.to(accumulation_dtype(hidden)),
        skip_tolerance=skip_tolerance,
        chunk_rows=chunk_rows or default_chunk_rows(hidden.shape[0], setting.widest(tensors), hidden.device),
    )
    return differentiated_pass(hidden, tensors, setting, target, plan)


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: LossFunction,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    row_weight: Tensor | None = None,
) -> TokenLoss:
    """What `linear_token_loss` means: plain autograd through N x V logits, without checks; nothing is skipped."""
    weight, bias = adapted(weight, lora)[:valid_vocab], None if bias is None else bias[:valid_vocab]
    logit_map = LogitMap(logit_scale, softcap, temperature)
    trained = torch.ones_like(target, dtype=torch.bool) if row_weight is None else row_weight != 0
    rows = trained.nonzero()[:, 0]
    z = reference_logits(hidden[rows], weight, bias, logit_map.rows(rows))
    stats = reference_stats(z, target[rows])
    per_row = loss_fn(stats.logprob, stats.entropy, rows)
    loss = (per_row if row_weight is None else per_row * row_weight[rows].to(per_row.dtype)).sum()
    full = (torch.zeros_like(target, dtype=x.dtype).index_copy(0, rows, x.detach()) for x in stats)
    return TokenLoss(loss, TokenStats(*full), torch.zeros_like(loss))


def differentiated_pass(
    hidden: Tensor, tensors: HeadTensors, setting: HeadSetting, target: Tensor, plan: Plan
) -> TokenLoss:
    """`single_pass` as a differentiable function; when nothing wants a gradient, only its 2 N D V operations."""
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, *tensors)]
    with torch.autocast(hidden.device.type, enabled=False):
        if not any(wanted):
            loss, stats, skipped_bound, _ = single_pass(hidden, tensors, setting, target, Needs(*wanted), plan)
            return TokenLoss(loss, stats, skipped_bound)
        loss, logprob, entropy, lse, skipped_bound = _SinglePass.apply(
            hidden, *tensors, setting, target, plan, Needs(*wanted)
        )
        return TokenLoss(loss, TokenStats(logprob, entropy, lse), skipped_bound)


class _SinglePass(torch.autograd.Function):
    """Keeps the gradients that `single_pass` made and scales them when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        setting: HeadSetting,
        target: Tensor,
        plan: Plan,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        tensors = HeadTensors(weight, bias, lora_a, lora_b)
        loss, stats, skipped_bound, total = single_pass(hidden, tensors, setting, target, needs, plan)
        assert total is not None
        ctx.save_for_backward(*total.settled(hidden, tensors))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, *tensors)]
        ctx.main_grad = setting.main_grad if needs.weight else None
        ctx.mark_non_differentiable(*stats, skipped_bound)
        ctx.set_materialize_grads(False)
        return loss, *stats, skipped_bound

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        kept = list(ctx.saved_tensors)
        for_autograd = None
        if ctx.main_grad is not None:
            for_autograd, kept[1] = ctx.main_grad.taken(kept[1], grad_loss), None
        d_hidden, d_weight, *others = (
            None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in zip(kept, ctx.dtypes, strict=True)
        )
        return d_hidden, for_autograd if d_weight is None else d_weight, *others, None, None, None, None
