"""A head whose vocabulary lies on several ranks: the statistics of the shards, merged by two all-reduces per chunk.

With M = max_r lse_r, e_r = exp(lse_r - M) and S = sum_r e_r over the ranks r, whose shards have V_r of V tokens:

    lse = M + log S             logprob = logprob_owner + (lse_owner - M) - log S
    entropy = log S + sum_r e_r (entropy_r + M - lse_r) / S         mean_logit = sum_r V_r mean_logit_r / V

The entropy's is the chain rule: its terms are not negative, so that none cancels another. What a chunk loop calls is
wrapped, so the loops know nothing of ranks: every rank decides from the same merged numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.ops.logit_map import LogitMap
from fastrl.ops.row_kernels import RowKernels
from fastrl.ops.token_stats import RowGrads, RowStats


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The tokens start <= id < start + size of `total`, on one rank of `group`.

    Attributes:
        group: the ranks that hold the vocabulary together; all see the same hidden states, targets and weights.
        start: id of this rank's first token.
        size: this rank's tokens; may be 0.
        total: tokens of all ranks.
        widest: rows of the weight on the rank with most; chunks are sized by it, alike on all ranks.
    """

    group: dist.ProcessGroup
    start: int
    size: int
    total: int
    widest: int

    def valid(self, valid_vocab: int | None) -> VocabShard:
        """The shard without ids from valid_vocab on."""
        if valid_vocab is None:
            return self
        size = min(max(valid_vocab - self.start, 0), self.size)
        return VocabShard(self.group, self.start, size, valid_vocab, self.widest)

    def owned(self, target: Tensor) -> Tensor:
        """[C] bool, the targets that are tokens of this rank."""
        return (target >= self.start) & (target < self.start + self.size)

    def local(self, target: Tensor) -> Tensor:
        """[C] places of the targets in this shard; -1 for those that are not here."""
        return (target - self.start).where(self.owned(target), -1)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in x's memory."""
        dist.all_reduce(x, group=self.group)
        return x


def equal_shard(rows: int, group: dist.ProcessGroup) -> VocabShard:
    """The shard of a rank that holds `rows` tokens, as every other does, in the order of ranks."""
    return cut_shard(rows * dist.get_world_size(group), group)


def cut_shard(total: int, group: dist.ProcessGroup) -> VocabShard:
    """This rank's shard of `total` tokens cut as torch.chunk and DTensor cut: ceil(total / ranks) each, the rest last.

    Raises:
        ValueError: this rank is not in the group, or some rank would have no token.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("process_group must contain this rank: pass the group whose ranks hold the vocabulary")
    widest = -(-total // ranks)
    if total and total <= (ranks - 1) * widest:
        raise ValueError(f"a vocabulary of {total} in parts of {widest} leaves ranks of {ranks} without any: use fewer")
    return VocabShard(group, rank * widest, min(widest, total - rank * widest), total, widest)


def sharded(kernels: RowKernels, shard: VocabShard) -> RowKernels:
    """The functions of a backend for one shard's logits [C, V_r]; targets are global ids, statistics are merged."""

    def stats(raw: Tensor, target: Tensor, logit_map: LogitMap, *, with_mean: bool = False) -> RowStats:
        return merged(kernels.stats(raw, shard.local(target), logit_map, with_mean=with_mean), target, shard)

    def product_stats(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        logit_map: LogitMap,
        *,
        with_mean: bool = False,
    ) -> RowStats | None:
        found = kernels.product_stats(hidden, weight, bias, shard.local(target), logit_map, with_mean=with_mean)
        return None if found is None else merged(found, target, shard)

    def gradient(
        raw: Tensor, target: Tensor, stats: RowStats, grads: RowGrads, logit_map: LogitMap, **kwargs: Any
    ) -> Tensor:
        return kernels.gradient(
            raw, shard.local(target), stats, _local_grads(grads, target, shard), logit_map, **kwargs
        )

    def cached_gradient(
        probability: Tensor, target: Tensor, stats: RowStats, grads: RowGrads, logit_map: LogitMap, **kwargs: Any
    ) -> Tensor:
        local = _local_grads(grads, target, shard)
        return kernels.cached_gradient(probability, shard.local(target), stats, local, logit_map, **kwargs)

    return RowKernels(stats, gradient, kernels.probability, cached_gradient, product_stats)


def merged(local: RowStats, target: Tensor, shard: VocabShard) -> RowStats:
    """Statistics [C] of the whole vocabulary from those of every rank's shard; a shard without a token has lse -inf."""
    top = local.lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=shard.group)
    below = local.lse - top
    share = below.exp()
    taken = torch.where(below == -torch.inf, below, local.logprob + below)
    rows = [
        share,
        (share * (local.entropy - below)).masked_fill(share == 0, 0),
        taken.masked_fill(~shard.owned(target), 0),
    ]
    if local.mean_logit is not None:
        rows.append(local.mean_logit * (shard.size / shard.total) if shard.size else torch.zeros_like(top))
    share, spread, taken, *mean = shard.sum_(torch.stack(rows)).unbind()
    log_share = share.log()
    logprob = (taken - log_share).masked_fill(target < 0, 0)
    return RowStats(logprob, log_share + spread / share, top + log_share, mean[0] if mean else None)


def _local_grads(grads: RowGrads, target: Tensor, shard: VocabShard) -> RowGrads:
    """Upstream gradients by this shard's own numbers: a target that is elsewhere leaves d z = -a p here.

    A kernel adds a [v = t] for a target that it has and -a p for it as well; without one, -a joins lse's gradient.
    """
    logprob, lse = grads.logprob, grads.lse
    if logprob is not None:
        elsewhere = (target >= 0) & ~shard.owned(target)
        pushed = -logprob.masked_fill(~elsewhere, 0)
        lse = pushed if lse is None else lse + pushed
    mean = None if grads.mean_logit is None else grads.mean_logit * (shard.size / shard.total)
    return RowGrads(logprob, grads.entropy, lse, mean)
