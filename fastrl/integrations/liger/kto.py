"""Liger's KTO: single completions judged desirable or not, against a baseline that the caller made."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastrl import losses
from fastrl.integrations.liger.head import logit_sum, operands, sequence_logprob


class LigerFusedLinearKTOLoss(torch.nn.Module):
    """`loss(_input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl)`.

    Returns `(loss, metrics)`: the mean over sequences of `fastrl.losses.kto`, and sums over the desirable and over the
    undesirable sequences: log-probability of each, all logits of each, reward of each. `compiled` and `chunk_size` are
    accepted, kept as attributes, and change no number here. `kl` is one number, a constant; Liger's result for more
    than one depends on its chunk_size, so that is refused.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.compiled, self.use_ref_model = ignore_index, beta, compiled, use_ref_model
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As in the class."""
        if preference_labels is None:
            raise ValueError("KTO needs preference_labels [B], a bool for each sequence: True where it is desirable")
        if preference_labels.shape != target.shape[:1]:
            raise ValueError(f"preference_labels must be [{len(target)}], got shape {tuple(preference_labels.shape)}")
        if kl is not None and kl.numel() != 1:
            raise ValueError(f"kl must be one number for the batch, got shape {tuple(kl.shape)}: pass kl.mean()")
        head = operands(_input, lin_weight, bias)
        per_sequence = partial(sequence_logprob, ignore_index=self.ignore_index, average=self.average_log_prob)
        logprob = per_sequence(head, target)
        log_ratio = logprob
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model needs ref_input and ref_weight; pass them or set use_ref_model=False")
            with torch.no_grad():
                reference = per_sequence(operands(ref_input, ref_weight, ref_bias), target)
            log_ratio = logprob - reference
        baseline = log_ratio.new_zeros(()) if kl is None else kl.reshape(()).to(log_ratio.dtype)
        desirable = preference_labels.bool()
        loss = losses.kto(log_ratio, desirable, baseline, beta=self.beta).sum() / len(target)
        shown = (logprob.detach(), logit_sum(head, len(target)), self.beta * log_ratio.detach())
        return loss, tuple(x[of].sum() for x in shown for of in (desirable, ~desirable))
