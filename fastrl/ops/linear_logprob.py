"""The narrow waist: hidden states to log-probability, entropy and log-sum-exp of tokens, never holding N x V numbers.

Everything an objective needs from the vocabulary is N numbers per statistic, and everything the head needs back is
one coefficient per row and statistic. `linear_token_loss` is the same waist with the loss inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional

from fastrl.ops.backend import Implementations, choose
from fastrl.ops.checks import check_chunk_rows, check_head, check_map, check_shapes, check_target
from fastrl.ops.compiled import declared_logprob, is_declared
from fastrl.ops.first_order import first_order
from fastrl.ops.gemm import accumulation_dtype, operand
from fastrl.ops.head import (
    HeadGradient,
    HeadOperands,
    HeadSetting,
    HeadTensors,
    Needs,
    chunks,
    default_chunk_rows,
    head_operands,
)
from fastrl.ops.local_head import check_backend, local_head, on_this_rank
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.lora import Lora, adapted
from fastrl.ops.row_kernels import row_kernels
from fastrl.ops.token_stats import RowGrads, RowStats, TokenStats, reference_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# mapped logits [C, V], not to be kept or changed; places of their rows
Observer = Callable[[Tensor, slice], None]

CACHE_GIB = 0.25  # small heads are never recomputed; a large one trades 2.3 GiB per 8192 rows x 151936 tokens

_IMPLEMENTATIONS = Implementations("linear_logprob", triton="fastrl.kernels.token_stats")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    cache_gib: float | None = None,
    process_group: ProcessGroup | None = None,
    observe: Observer | None = None,
    chunk_rows: int | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> TokenStats:
    """Log-probability of each target under a linear head, with the entropy and log-sum-exp of its distribution.

        z[n, v] = softcap(logit_scale (hidden[n] . weight[v] + bias[v])) / temperature[n]
        lse[n] = log sum_v exp z[n, v];  logprob[n] = z[n, target[n]] - lse[n];  entropy[n] = lse[n] - sum_v p z

    Args:
        hidden: [N, D] last hidden states; differentiable. float64, float32, bfloat16 or float16.
        weight: [V, D] head, in hidden's dtype; differentiable.
        target: [N] int64. A negative one is ignored: logprob 0 without gradient, entropy and lse as ever.
        bias: [V], -inf forbids a token; differentiable.
        lora: a trained low-rank change of weight, which is usually frozen then: nothing of its size is made.
        temperature: divides the capped logits; a number, or [N] one per row; a constant.
        softcap: c in c tanh(z / c), before the temperature; None caps nothing.
        logit_scale: multiplies the logits, before the cap.
        valid_vocab: rows of weight from here on are padding and are no tokens; None means all are tokens.
        cache_gib: memory for probabilities kept from forward, so that their rows skip the logits product in
            backward; 0 keeps none, None 0.25. Kept in hidden's dtype; capped logits are never kept.
        process_group: ranks that hold the vocabulary together, in equal parts and in the order of ranks; weight and
            bias are this rank's part [V / ranks, ..], targets and valid_vocab still count all tokens, and everything
            else is the same on every rank. All ranks must call. A DTensor cut along dimension 0 by this group will
            do, and its parts may differ in size. None: weight is the whole vocabulary, perhaps a replicated DTensor.
        observe: is shown each chunk's z [C, V] and the slice of its rows once, in order, without gradient: what a
            caller wants of the logits besides (an argmax, a mean) costs no second product. Of one rank's vocabulary.
        chunk_rows: rows worked on at a time; None fits a memory budget. Changes rounding only.
        batch_invariant: give a row the same bits in every batch: the statistics come out of a Triton product with
            fixed tiles, never out of a product that may sum in another order for other N; nothing is cached. Triton
            only, not for float64. Gradients are not batch-invariant: d weight sums over the batch.
        backend: "reference" (N x V numbers, plain autograd), "torch" (chunks) or "triton" (chunks, whose elementwise
            work is one read for the statistics and one read and one write for the gradient); None: the machine's best.

    Returns:
        TokenStats of [N] float32 (float64 for float64 inputs), each differentiable with respect to hidden, weight
        and bias, once.

    Gradient: rows whose coefficients are all 0 cost nothing. d weight is summed in float32; where weight carries a
        `main_grad` (Megatron's), it is added there and weight gets None (`fastrl.ops.main_grad`). In a compiled step
        the call is one operator, and backward makes the statistics once more (`fastrl.ops.compiled`).

    Cost: 2 N D V operations forward; backward 4 N D V, and 2 N D V more for rows outside the cache. Memory: three
        chunks of float32 logits (four with a cap), the cache, and a float32 [V, D] in backward.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit (target ids are range-checked on CPU only).
        RuntimeError: the backend that was asked for cannot run here.
    """
    options: dict[str, Any] = {
        "bias": bias,
        "lora": lora,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "valid_vocab": valid_vocab,
        "cache_gib": cache_gib,
        "chunk_rows": chunk_rows,
        "batch_invariant": batch_invariant,
        "backend": backend,
    }
    if observe is None and is_declared(hidden, weight, process_group, backend):
        return TokenStats(*declared_logprob(hidden, weight, target, **options))
    call = _uncompiled if torch.compiler.is_compiling() else _linear_logprob
    return call(hidden, weight, target, process_group=process_group, observe=observe, **options)


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    lora: Lora | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
    process_group: ProcessGroup | None,
    observe: Observer | None,
    cache_gib: float | None,
    chunk_rows: int | None,
    batch_invariant: bool,
    backend: str | None,
) -> TokenStats:
    """The op itself."""
    weight, bias, lora, shard = on_this_rank(weight, bias, lora, process_group)
    check_shapes(
        "hidden[N,D] weight[V,D] target[N] bias[V] lora.a[r,D] lora.b[V,r] temperature[N]",
        {
            "hidden": hidden,
            "weight": weight,
            "target": target,
            "bias": bias,
            "lora.a": None if lora is None else lora.a,
            "lora.b": None if lora is None else lora.b,
            "temperature": temperature if isinstance(temperature, Tensor) else None,
        },
    )
    vocabulary = weight.shape[0] if shard is None else shard.total
    check_head(hidden, weight, vocabulary, valid_vocab)
    check_target(target, valid_vocab or vocabulary)
    check_map(temperature, softcap, logit_scale)
    check_chunk_rows(chunk_rows)
    if cache_gib is not None and not (isinstance(cache_gib, int | float) and 0 <= cache_gib < math.inf):
        raise ValueError(f"cache_gib must be a number of GiB, finite and not negative, got {cache_gib!r}")
    if observe is not None and (process_group is not None or batch_invariant):
        raise ValueError("observe sees logits, which process_group cuts and batch_invariant never makes: leave it out")
    if batch_invariant and lora is not None:
        raise ValueError("batch_invariant has no fixed tiles for lora: merge it into weight with weight + scale b @ a")
    if batch_invariant and hidden.dtype == torch.float64:
        raise ValueError("batch_invariant is for float32, bfloat16 and float16, got torch.float64: cast with .float()")
    chosen = choose(backend, hidden, _IMPLEMENTATIONS)
    check_backend(chosen, shard)
    logit_map = LogitMap(logit_scale, softcap, temperature)
    if chosen == "reference" and not batch_invariant:
        weight, bias = adapted(weight, lora)[:valid_vocab], None if bias is None else bias[:valid_vocab]
        z = reference_logits(hidden, weight, bias, logit_map)
        if observe is not None:
            observe(z.detach(), slice(0, len(z)))
        return reference_stats(z, target)
    kernels = row_kernels(chosen, batch_invariant=batch_invariant)
    setting = HeadSetting(logit_map, kernels, shard, 1.0 if lora is None else lora.scale)
    tensors, setting = local_head(weight, bias, lora, setting, valid_vocab)
    size = chunk_rows or default_chunk_rows(hidden.shape[0], setting.widest(tensors), hidden.device)
    cache_bytes = int((CACHE_GIB if cache_gib is None else cache_gib) * 2**30)
    if batch_invariant or not torch.is_grad_enabled():
        cache_bytes = 0
    return TokenStats(*_LinearLogprob.apply(hidden, *tensors, setting, target, size, cache_bytes, observe))


_uncompiled = _disable_dynamo(_linear_logprob)


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> TokenStats:
    """What `linear_logprob` means: plain differentiable PyTorch over N x V logits, without checks."""
    weight, bias = adapted(weight, lora)[:valid_vocab], None if bias is None else bias[:valid_vocab]
    z = reference_logits(hidden, weight, bias, LogitMap(logit_scale, softcap, temperature))
    return reference_stats(z, target)


def reference_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap) -> Tensor:
    """Mapped logits [N, V] in the accumulation dtype; the product is rounded to hidden's dtype first."""
    raw = functional.linear(hidden, weight).to(accumulation_dtype(hidden))
    return logit_map.apply(raw if bias is None else raw + bias.to(raw.dtype))


class _LinearLogprob(torch.autograd.Function):
    """Chunked statistics; backward recomputes the logits of rows whose probabilities were not kept."""

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
        size: int,
        cache_bytes: int,
        observe: Observer | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors, needs = HeadTensors(weight, bias, lora_a, lora_b), Needs(*ctx.needs_input_grad[:5])
        room = 0 if setting.logit_map.softcap is not None or not any(needs) else cache_bytes
        kept: list[Tensor] = []
        with torch.autocast(hidden.device.type, enabled=False):
            head = head_operands(tensors, setting)
            stats = hidden.new_empty((3, hidden.shape[0]), dtype=accumulation_dtype(hidden))
            for rows in chunks(hidden.shape[0], size):
                room -= (rows.stop - rows.start) * weight.shape[0] * hidden.element_size()
                of_chunk, probability = _chunk_stats(head, hidden[rows], target[rows], rows, observe, keep=room >= 0)
                stats[:, rows] = torch.stack(of_chunk[:3])
                if probability is not None:
                    kept.append(probability)
        logprob, entropy, lse = stats.unbind()
        ctx.save_for_backward(hidden, *tensors, target, setting.logit_map.row_temperature, stats, *kept)
        ctx.setting, ctx.size, ctx.needs = setting, size, needs
        ctx.set_materialize_grads(False)
        return logprob.clone(), entropy.clone(), lse.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lora_a, lora_b, target, _, stats, *kept = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            tensors = HeadTensors(weight, bias, lora_a, lora_b)
            head = head_operands(tensors, ctx.setting)
            total = HeadGradient(hidden, tensors, ctx.setting, ctx.needs, into_main_grad=True)
            for i, rows in enumerate(chunks(hidden.shape[0], ctx.size)):
                cached = kept[i] if i < len(kept) else None
                _add_chunk(total, head, hidden, target, RowStats(*stats.unbind()), RowGrads(*upstream), rows, cached)
        d_hidden, d_weight, *others = total.settled(hidden, tensors)
        if ctx.setting.main_grad is not None and d_weight is not None:
            d_weight = ctx.setting.main_grad.taken(d_weight)
        grads = (
            None if grad is None else grad.to(x.dtype)
            for grad, x in zip((d_hidden, d_weight, *others), (hidden, *tensors), strict=True)
        )
        return *grads, None, None, None, None, None


def _chunk_stats(
    head: HeadOperands, hidden: Tensor, target: Tensor, rows: slice, observe: Observer | None, *, keep: bool
) -> tuple[RowStats, Tensor | None]:
    """Statistics of a chunk and, to keep, its probabilities in hidden's dtype."""
    logit_map = head.logit_map.rows(rows)
    if not keep and observe is None:
        return head.stats(operand(hidden), target, logit_map), None
    raw = head.raw(operand(hidden))
    stats = head.kernels.stats(raw, target, logit_map)
    if observe is not None:
        observe(logit_map.apply(raw), rows)
    if not keep:
        return stats, None
    return stats, head.kernels.probability(raw, stats.lse, logit_map, hidden.dtype)


def _add_chunk(
    total: HeadGradient,
    head: HeadOperands,
    hidden: Tensor,
    target: Tensor,
    stats: RowStats,
    grads: RowGrads,
    rows: slice,
    cached: Tensor | None,
) -> None:
    """Add one chunk's share to the head's gradient, leaving out rows without any coefficient."""
    active = grads.rows(rows).is_nonzero(target[rows])
    if active is None:
        return
    index = active.nonzero()[:, 0]
    if len(index) == 0:
        return
    compact = index if len(index) < rows.stop - rows.start else None
    places = rows if compact is None else index + rows.start
    chunk = operand(hidden[places])
    of_rows = (target[places], stats.rows(places), grads.rows(places), head.logit_map.rows(places))
    dtype = total.dtype(chunk)
    if cached is None:
        gradient = head.kernels.gradient(head.raw(chunk), *of_rows, dtype=dtype)
    else:
        gradient = head.kernels.cached_gradient(cached, *of_rows, dtype=dtype, index=compact)
    total.add(head, chunk, places, gradient)
