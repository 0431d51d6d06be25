"""Everything O(V) about a row of logits, reduced to a few numbers, and the way back.

With z the mapped logits of a row, p = softmax(z), t its target:

    lse = log sum_v exp z_v      logprob = z_t - lse      entropy = -sum_v p_v log p_v      mean_logit = mean_v z_v
    d z_v = p_v (l - a - b (log p_v + entropy)) + a [v = t] + s / V

where a, b, l, s are the upstream gradients of logprob, entropy, lse and mean_logit. At the target p_t and 1 - p_t come
from logprob: from z_t - lse, or from a p_t that was rounded, 1 - p_t would be noise where p_t is near 1.
A negative target is ignored: its logprob is 0 and has no gradient; the other numbers are defined as ever.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ops.gemm import accumulation_dtype
from fastrl.ops.logit_map import LogitMap

# log p below this counts as this: exp gives an exact 0 in float64 too, so p log p is 0 and never 0 x -inf.
LOG_ZERO = -1000.0


class TokenStats(NamedTuple):
    """What a row's distribution says about its token; [N] float32 (float64 for float64 inputs), in nats."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor


class RowStats(NamedTuple):
    """TokenStats of a chunk and what only some losses need; [C]."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    mean_logit: Tensor | None = None

    def rows(self, index: Tensor | slice) -> RowStats:
        """The statistics of some of the rows."""
        mean = None if self.mean_logit is None else self.mean_logit[index]
        return RowStats(self.logprob[index], self.entropy[index], self.lse[index], mean)

    def leaves(self) -> RowStats:
        """The same numbers as leaves of a new graph."""
        mean = None if self.mean_logit is None else self.mean_logit.detach().requires_grad_()
        logprob, entropy, lse = (x.detach().requires_grad_() for x in (self.logprob, self.entropy, self.lse))
        return RowStats(logprob, entropy, lse, mean)


class RowGrads(NamedTuple):
    """Upstream gradients of RowStats, [C] each; None where the loss does not depend on the number."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    mean_logit: Tensor | None = None

    def rows(self, index: Tensor | slice) -> RowGrads:
        """The gradients of some of the rows."""
        return RowGrads(*(None if x is None else x[index] for x in self))

    def is_nonzero(self, target: Tensor) -> Tensor | None:
        """[C] bool, the rows that have a gradient at all (NaN is one); None when no number has.

        The logprob of an ignored target has none, whatever is upstream of it.
        """
        given = [x != 0 for x in self[1:] if x is not None]
        if self.logprob is not None:
            given.append((self.logprob != 0) & (target >= 0))
        return torch.stack(given).any(0) if given else None


def reference_stats(z: Tensor, target: Tensor) -> TokenStats:
    """The specification: z [N, V] mapped logits, target [N] int64 -> TokenStats, by plain autograd."""
    logp = z.log_softmax(-1)
    taken = logp.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.clamp(min=LOG_ZERO)).sum(-1)
    return TokenStats(taken.masked_fill(target < 0, 0), entropy, z.logsumexp(-1))


def row_stats(raw: Tensor, target: Tensor, logit_map: LogitMap, *, with_mean: bool = False) -> RowStats:
    """raw [C, V] logits before the map, target [C] -> RowStats; raw is read only, two [C, V] temporaries at most.

    16-bit logits are upcast first: one more temporary.
    """
    raw = raw.to(accumulation_dtype(raw))
    z = logit_map.apply(raw)
    mean = z.mean(-1) if with_mean else None
    # Without a single token, lse is -inf and the rest NaN; a finite maximum keeps lse from being NaN too.
    top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
    taken = (z.gather(-1, target.clamp(min=0)[:, None]) - top)[:, 0]
    shifted = torch.sub(z, top, out=None if z is raw else z).clamp_(min=LOG_ZERO)
    exp = shifted.exp()
    total = exp.sum(-1)
    log_total = total.log()
    entropy = log_total - shifted.mul_(exp).sum(-1) / total
    return RowStats((taken - log_total).masked_fill(target < 0, 0), entropy, log_total + top[:, 0], mean)


def row_gradient_(raw: Tensor, target: Tensor, stats: RowStats, grads: RowGrads, logit_map: LogitMap) -> Tensor:
    """Turn raw [C, V] into d loss / d raw, in place where the map allows; one [C, V] temporary, two with a cap.

    Args:
        raw: logits before the map; overwritten.
        target: [C].
        stats: of these rows.
        grads: upstream gradients.
        logit_map: of these rows.

    Returns:
        [C, V] gradient in raw's dtype.
    """
    slope = logit_map.slope(raw)
    z = logit_map.apply(raw)
    logp = z.sub_(stats.lse[:, None])
    probability = logp.exp() if grads.entropy is not None else logp.exp_()
    gradient = combine_(probability, logp, target, stats, grads, logit_map.factor(stats.lse))
    return gradient if slope is None else gradient.mul_(slope)


def cached_gradient(
    probability: Tensor, target: Tensor, stats: RowStats, grads: RowGrads, logit_map: LogitMap
) -> Tensor:
    """`row_gradient_` from probabilities kept in forward, perhaps in bf16, instead of logits; no cap."""
    exact = probability.to(stats.lse.dtype, copy=True)
    logp = exact.log() if grads.entropy is not None else exact
    return combine_(exact, logp, target, stats, grads, logit_map.factor(stats.lse))


def combine_(
    probability: Tensor, logp: Tensor, target: Tensor, stats: RowStats, grads: RowGrads, factor: float | Tensor
) -> Tensor:
    """factor d z of the module's formula, in probability's memory; logp is overwritten when entropy has a gradient."""
    zero, is_ignored = torch.zeros_like(stats.entropy), target < 0
    a = zero if grads.logprob is None else grads.logprob.masked_fill(is_ignored, 0) * factor
    b = zero if grads.entropy is None else grads.entropy * factor
    l = zero if grads.lse is None else grads.lse * factor  # noqa: E741
    if grads.entropy is None:
        gradient = probability.mul_((l - a)[:, None])
    else:
        gradient = probability.mul_(
            logp.clamp_(min=LOG_ZERO).mul_(-b[:, None]).add_((l - a - b * stats.entropy)[:, None])
        )
    inner = l - b * (stats.logprob.clamp(min=LOG_ZERO) + stats.entropy)
    at_target = stats.logprob.exp() * inner - a * stats.logprob.expm1()
    place = target.clamp(min=0)[:, None]
    gradient.scatter_(-1, place, gradient.gather(-1, place).where(is_ignored[:, None], at_target[:, None]))
    if grads.mean_logit is not None:
        gradient.add_((grads.mean_logit * factor / gradient.shape[-1])[:, None])
    return gradient
