"""The linear head a chunk of rows at a time: logits of a chunk, the gradients they leave, how many rows fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ops.gemm import accumulation_dtype, addmm_, mm, mm_aligned, operand
from fastrl.ops.logit_map import LogitMap
from fastrl.ops.lora import Lora
from fastrl.ops.main_grad import MainGrad
from fastrl.ops.row_kernels import RowKernels
from fastrl.ops.token_stats import RowStats
from fastrl.ops.vocab_parallel import VocabShard, sharded

# Float32 logits of one chunk. Fewer rows read and write the weight's gradient more often; more rows need memory.
CUDA_CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES = 2 << 20  # the fastest of 0.5 to 8 MiB at V = 64 to 32000 on one core: about its cache
LEAST_CHUNK_ROWS = 128  # fewer make thin matrix products, whatever the vocabulary


def default_chunk_rows(n: int, v: int, device: torch.device) -> int:
    """Rows per chunk so that one chunk's float32 logits fit the device's budget; chunks are of nearly equal size."""
    budget = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    most = max(LEAST_CHUNK_ROWS, budget // (4 * max(v, 1)))
    chunks = -(-n // most)
    return -(-n // chunks) if n else 1


def chunks(n: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows that cover range(n); the last may be shorter."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class HeadTensors(NamedTuple):
    """What of a head can want a gradient, as this rank has it: weight [V, D], bias [V], LoRA's a [r, D], b [V, r]."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


@dataclass(frozen=True, slots=True)
class HeadSetting:
    """What of a head is constant.

    Attributes:
        logit_map: of all N rows.
        kernels: the backend's.
        shard: the tokens of this rank; None: all of them.
        lora_scale: of LoRA's product.
        main_grad: where d weight goes instead of to autograd.
    """

    logit_map: LogitMap
    kernels: RowKernels
    shard: VocabShard | None
    lora_scale: float = 1.0
    main_grad: MainGrad | None = None

    def widest(self, tensors: HeadTensors) -> int:
        """Tokens on the rank with most, alike on all ranks."""
        return tensors.weight.shape[0] if self.shard is None else self.shard.widest


@dataclass(frozen=True, slots=True)
class HeadOperands:
    """A head ready for chunked products.

    Attributes:
        weight: [V, D] as `gemm.operand` gives it.
        bias: [V] in the accumulation dtype, or None.
        logit_map: of all N rows.
        kernels: what works on its logits.
        lora: its tensors in weight's dtype, or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_map: LogitMap
    kernels: RowKernels
    lora: Lora | None

    def raw(self, hidden: Tensor) -> Tensor:
        """hidden [C, D] operand -> [C, V] logits before the map, in the accumulation dtype; fresh memory."""
        logits = mm_aligned(hidden, self.weight.t())
        if self.lora is not None:
            addmm_(logits, low_rank(hidden, self.lora.a.t(), self.lora), self.lora.b.t())
        return logits if self.bias is None else logits.add_(self.bias)

    def stats(self, hidden: Tensor, target: Tensor, logit_map: LogitMap, *, with_mean: bool = False) -> RowStats:
        """Statistics of hidden [C, D], target [C] whose logits nobody needs afterwards; logit_map is of these rows."""
        if self.lora is None:
            found = self.kernels.product_stats(hidden, self.weight, self.bias, target, logit_map, with_mean=with_mean)
            if found is not None:
                return found
        return self.kernels.stats(self.raw(hidden), target, logit_map, with_mean=with_mean)


def head_operands(tensors: HeadTensors, setting: HeadSetting) -> HeadOperands:
    """The head ready for products, with kernels that know its shard."""
    weight, bias, a, b = tensors
    multiplied = operand(weight)
    lora = None if a is None or b is None else Lora(a.to(multiplied.dtype), b.to(multiplied.dtype), setting.lora_scale)
    wide_bias = None if bias is None else bias.to(accumulation_dtype(weight)).contiguous()
    kernels = setting.kernels if setting.shard is None else sharded(setting.kernels, setting.shard)
    return HeadOperands(multiplied, wide_bias, setting.logit_map, kernels, lora)


def low_rank(x: Tensor, factor: Tensor, lora: Lora) -> Tensor:
    """scale x factor [C, r], rounded to the operands' dtype."""
    return mm(x, factor).mul_(lora.scale).to(x.dtype)


class Needs(NamedTuple):
    """Which tensors want a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class HeadGradient:
    """Owns the sums that chunks add to: d hidden [N, D] and one like each of HeadTensors; None where not needed.

    They are summed in the accumulation dtype; each d hidden row is written once. Shards of a vocabulary have their own
    d weight, d bias and d lora_b, and each a part of d hidden and d lora_a.
    """

    def __init__(
        self,
        hidden: Tensor,
        tensors: HeadTensors,
        setting: HeadSetting,
        needs: Needs,
        *,
        into_main_grad: bool = False,
    ) -> None:
        """Zeros; with into_main_grad d weight is summed in the buffer itself where that has the sums' dtype."""
        dtype, self.shard, self.main_grad = accumulation_dtype(hidden), setting.shard, setting.main_grad
        # fp16 cannot hold a token's share of the loss; it is rounded after grad_output (a GradScaler's) multiplied it.
        # Parts of several ranks are rounded once, after their sum.
        kept = dtype if hidden.dtype == torch.float16 or self.shard is not None else hidden.dtype
        self.hidden = torch.zeros(hidden.shape, dtype=kept, device=hidden.device) if needs.hidden else None
        buffer = self.main_grad.buffer if into_main_grad and self.main_grad is not None else None
        is_summed_there = needs.weight and buffer is not None and buffer.dtype == dtype
        fresh = (needs.weight and not is_summed_there, *needs[2:])
        self.weight, self.bias, self.lora_a, self.lora_b = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) if x is not None and is_fresh else None
            for x, is_fresh in zip(tensors, fresh, strict=True)
        )
        if is_summed_there:
            self.weight = buffer

    def dtype(self, hidden: Tensor) -> torch.dtype:
        """What `add` wants the chunk's gradient in: the operand's dtype, wider while d bias has yet to be summed."""
        return hidden.dtype if self.bias is None else self.bias.dtype

    def add(self, head: HeadOperands, hidden: Tensor, rows: Tensor | slice, gradient: Tensor) -> None:
        """Add a chunk.

        Args:
            head: whose weight made the logits.
            hidden: [C, D] operand of the chunk.
            rows: their places in the N rows.
            gradient: [C, V] d loss / d raw in `dtype(hidden)`.
        """
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))
        rounded = gradient.to(hidden.dtype)
        if self.weight is not None:
            addmm_(self.weight, rounded.t(), hidden)
        d_low = None if head.lora is None else self._add_lora(head.lora, hidden, rounded)
        if self.hidden is None:
            return
        if isinstance(rows, slice) and self.hidden.dtype == rounded.dtype and head.lora is None:
            torch.mm(rounded, head.weight, out=self.hidden[rows])
            return
        d_hidden = mm(rounded, head.weight)
        if head.lora is not None and d_low is not None:
            addmm_(d_hidden, d_low, head.lora.a)
        self.hidden[rows] = d_hidden.to(self.hidden.dtype)

    def _add_lora(self, lora: Lora, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Add a chunk to d a and d b; returns d loss / d (hidden a^T) [C, r]."""
        d_low = low_rank(gradient, lora.b, lora)
        if self.lora_a is not None:
            addmm_(self.lora_a, d_low.t(), hidden)
        if self.lora_b is not None:
            addmm_(self.lora_b, gradient.t(), low_rank(hidden, lora.a.t(), lora))
        return d_low

    def settled(self, hidden: Tensor, tensors: HeadTensors) -> tuple[Tensor | None, ...]:
        """Call once: the sums for hidden and `tensors`, rounded to their dtypes; for fp16 and main_grad they are not.

        One all-reduce each of d hidden and d lora_a when the vocabulary is sharded, whatever a rank has added.
        """
        for part in (self.hidden, self.lora_a):
            if self.shard is not None and part is not None:
                self.shard.sum_(part)
        totals = (self.hidden, self.bias, self.lora_a, self.lora_b)
        pairs = zip(totals, (hidden, *tensors[1:]), strict=True)
        d_hidden, *others = (_rounded(total, like) for total, like in pairs)
        d_weight = self.weight if self.main_grad is not None else _rounded(self.weight, tensors.weight)
        return d_hidden, d_weight, *others


def _rounded(total: Tensor | None, like: Tensor | None) -> Tensor | None:
    if total is None or like is None or like.dtype == torch.float16:
        return total
    return total.to(like.dtype)
