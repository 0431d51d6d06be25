"""What stands in for TRL's `_ChunkedLogProbFunction`: the same `.apply`, over `fastrl.ops.linear_logprob`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import TokenStats, linear_logprob, linear_token_loss
from fastrl.ops.backend import BACKENDS
from fastrl.ops.first_order import first_order

# logprob [C], entropy [C], places [C] int64 among the rows that are scored -> loss [C]
TokenRule = Callable[[Tensor, Tensor, Tensor], Tensor]
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(slots=True)
class HeadCall:
    """What one forward of a model wants of its head besides TRL's arguments; owned by who makes the forward.

    Attributes:
        scored: [N] bool, the rows of hidden that have a label; the others are given zeros and cost nothing.
        rule: a loss per scored row, which is differentiated while its logits are there; None returns
            differentiable log-probabilities.
        loss: [] the sum of the rule's losses, once the head has run.
        given: log-probability and entropy [C] each that the model was given with a rule; leaves, so that what is made
            of them can be differentiated.
    """

    scored: Tensor
    rule: TokenRule | None = None
    loss: Tensor | None = field(default=None)
    given: tuple[Tensor, Tensor] | None = field(default=None)


_call: ContextVar[HeadCall | None] = ContextVar("fastrl_trl_head_call", default=None)


@contextmanager
def head_call(call: HeadCall) -> Iterator[HeadCall]:
    """The next forward in this context serves `call`.

    Raises:
        RuntimeError: the head was not asked, so TRL's own has run: somebody has called `unpatch()`.
    """
    token = _call.set(call)
    try:
        yield call
    finally:
        is_unserved = _call.get() is not None
        _call.reset(token)
    if is_unserved:
        raise RuntimeError("TRL's own head ran in a fastrl trainer: call fastrl.integrations.trl.patch() again")


@dataclass(frozen=True, slots=True)
class FusedHead:
    """Log-probabilities of a linear head's targets, and what TRL logs about them, without N x V logits.

    Attributes:
        cache_gib: memory for probabilities kept from forward to backward; see `linear_logprob`.
        backend: of the op.
    """

    cache_gib: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        gib = self.cache_gib
        if gib is not None and not (isinstance(gib, (int, float)) and 0 <= gib < math.inf):
            raise ValueError(f"cache_gib must be a number of GiB, finite and not negative, got {gib!r}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> Outputs:
        """TRL's nine arguments and five returns.

        Args:
            hidden: [N, D] last hidden states; differentiable.
            weight: [V, D] head; differentiable. Its gradient is summed and returned in float32 under autocast.
            bias: [V]; differentiable.
            targets: [N] int64.
            temperature: divides the capped logits.
            chunk_size: TRL's vocabulary columns at a time; a bound on memory, which fastrl keeps by chunks of rows.
            final_logit_softcapping: c in c tanh(z / c).
            logit_scale: multiplies the logits, before the cap.
            outputs: which of the last four returns are wanted.

        Returns:
            log-probability [N], entropy [N] (both differentiable, float32), log sum_v p_v^2 [N], mean mapped logit
            [N], whether the target is the first of the largest logits [N]; None for what is not in `outputs`.

        Raises:
            ValueError: a head that DeepSpeed ZeRO-3 has cut: its weight is gone again when backward needs it.
        """
        if getattr(weight, "ds_status", None) is not None:
            raise ValueError(
                "DeepSpeed ZeRO-3 takes the head's weight away before backward reads it again: train with ZeRO-2, "
                "or call fastrl.integrations.trl.unpatch() and use TRL's own head"
            )
        dtype = _compute_dtype(hidden)
        options: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
            "backend": self.backend,
        }
        hidden, weight = hidden.to(dtype), _in_dtype(weight, dtype)
        call = _call.get()
        if call is None:
            return self._outputs(hidden, weight, targets, outputs, options)
        _call.set(None)
        # On a GPU, TRL has left out the rows without a label; elsewhere they are still there.
        rows = None if len(targets) != len(call.scored) else call.scored.nonzero()[:, 0]
        of_rows = (hidden, targets) if rows is None else (hidden[rows], targets[rows])
        if call.rule is None:
            found = self._outputs(of_rows[0], weight, of_rows[1], outputs, options)
        else:
            call.loss, stats, _ = linear_token_loss(of_rows[0], weight, of_rows[1], call.rule, **options)
            call.given = (_leaf(stats.logprob), _leaf(stats.entropy))
            found = (*call.given, None, None, None)
        if rows is None:
            return found
        return tuple(None if x is None else x.new_zeros(len(targets)).index_put((rows,), x) for x in found)  # type: ignore[return-value]

    def _outputs(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...], options: dict[str, Any]
    ) -> Outputs:
        observer = _Observer(targets, outputs)
        observe = observer if observer.wants_logits else None
        stats: TokenStats = linear_logprob(
            hidden, weight, targets, observe=observe, cache_gib=self.cache_gib, **options
        )
        return (
            stats.logprob.float(),
            stats.entropy.float() if "entropy" in outputs else None,
            observer.log_sum_squares,
            observer.mean,
            observer.is_top,
        )


class _Observer:
    """Owns the numbers of each row that only a report wants; float32, without gradient."""

    def __init__(self, targets: Tensor, outputs: tuple[str, ...]) -> None:
        fresh = targets.new_zeros(targets.shape, dtype=torch.float32)
        self.targets = targets
        self.log_sum_squares = fresh.clone() if "log_sum_sq_probs" in outputs else None
        self.mean = fresh.clone() if "mean_logits" in outputs else None
        self.is_top = fresh.bool() if "is_top1" in outputs else None
        self.wants_logits = any(x is not None for x in (self.log_sum_squares, self.mean, self.is_top))

    def __call__(self, z: Tensor, rows: slice) -> None:
        """Take a chunk's mapped logits [C, V]."""
        if self.mean is not None:
            self.mean[rows] = z.mean(-1)
        if self.is_top is not None:
            self.is_top[rows] = z.argmax(-1) == self.targets[rows]
        if self.log_sum_squares is not None:
            self.log_sum_squares[rows] = (2 * z).logsumexp(-1) - 2 * z.logsumexp(-1)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().float().clone().requires_grad_()


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the head's products run in: autocast's dtype inside autocast, else hidden's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in dtype, whose gradient reaches weight without being rounded to dtype on its way."""
    if weight.dtype == dtype:
        return weight
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight.to(dtype)
    total = torch.zeros_like(weight)
    cast: Any = _Cast.apply(weight, dtype, total)
    # Megatron's convention, which the ops keep: the sum goes to the buffer, and `_Cast` hands the buffer on.
    cast.main_grad, cast.grad_added_to_main_grad = total, False
    return cast  # type: ignore[no-any-return]


class _Cast(torch.autograd.Function):
    """A cast whose gradient was summed in a buffer of weight's own dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, total: Tensor) -> Tensor:
        ctx.total = total
        return weight.to(dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.total.clone()
        ctx.total.zero_()  # a second backward through the same graph sums afresh
        return gradient, None, None
