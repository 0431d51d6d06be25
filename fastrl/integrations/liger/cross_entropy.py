"""Liger's linear cross entropy with its options: class weights, smoothing, z-loss, cap, token scaling, predictions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastrl.integrations.liger.head import Operands, operands, read_target
from fastrl.ops import linear_cross_entropy, linear_logprob
from fastrl.ops.head import chunks, default_chunk_rows
from fastrl.ops.logit_map import LogitMap


class CrossEntropyOutput(NamedTuple):
    """Fields of Liger's record of this name; None where they were not asked for."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """`loss(lin_weight, _input, target, bias)` -> loss, or CrossEntropyOutput where one of `return_` is set.

        loss = sum_n (share_ce[n] ce[n] + share_z[n] lse_square_scale lse[n]^2) (p[n] with use_token_scaling)

    Shares are 1 for "sum" and "none"; for "mean" 1 / sum of the targets' class weights, and 1 / number of tokens.
    Without class weights, token scaling and reduction "none" it is one pass of 6 N D V. Smoothing together with one
    of them works on chunks of logits by plain autograd, 8 N D V; z-loss shown and predictions are 2 N D V more each.
    `accum_dtype` is accepted: sums are float32 always.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean' or 'sum' or 'none'. Got: {reduction}")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap must greater than 0.0 or None. Got: {softcap}")
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = return_z_loss, accum_dtype, use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """As in the class."""
        head = operands(_input, lin_weight, bias)
        is_read = target != self.ignore_index
        safe = read_target(target, is_read, len(head.weight))
        if self.ce_weight is not None and self.ce_weight.shape != (len(head.weight),):
            raise ValueError(f"ce_weight must be [{len(head.weight)}], got shape {tuple(self.ce_weight.shape)}")
        is_plain = self.ce_weight is None and not self.use_token_scaling and self.reduction != "none"
        if is_plain and self.label_smoothing < 1:
            loss = linear_cross_entropy(
                head.hidden,
                head.weight,
                safe,
                token_weight=None if self.reduction == "mean" else is_read.float(),
                label_smoothing=self.label_smoothing,
                z_loss=self.lse_square_scale,
                bias=head.bias,
                softcap=self.softcap,
            )
            z_loss = self._shown_z_loss(head, safe, is_read) if self.return_z_loss else None
        else:
            loss, z_loss = self._by_rows(head, safe, is_read)
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        predicted = accuracy = None
        if self.return_token_accuracy or self.return_predicted_tokens:
            predicted = _predicted(head).masked_fill(~is_read, -1)
        if self.return_token_accuracy:
            hits = ((predicted == target) & is_read).float()
            accuracy = hits if self.reduction == "none" else hits.sum() / is_read.sum()
        return CrossEntropyOutput(
            loss,
            z_loss if self.return_z_loss else None,
            accuracy,
            predicted if self.return_predicted_tokens else None,
        )

    def _by_rows(self, head: Operands, target: Tensor, is_read: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its z-loss part, from numbers of every row."""
        if self.label_smoothing:
            cross_entropy, lse, logprob = self._smoothed_rows(head, target)
        else:
            stats = linear_logprob(head.hidden, head.weight, target, bias=head.bias, softcap=self.softcap)
            cross_entropy, lse, logprob = -stats.logprob, stats.lse, stats.logprob
            if self.ce_weight is not None:
                cross_entropy = cross_entropy * self.ce_weight.to(lse.dtype)[target.clamp(min=0)]
        z_loss = (self.lse_square_scale * lse.square()).where(is_read, 0.0)
        if self.reduction == "mean":
            counted = is_read.to(lse.dtype)
            if self.ce_weight is not None:
                counted = self.ce_weight.to(lse.dtype)[target.clamp(min=0)] * is_read
            cross_entropy = cross_entropy / counted.sum()
            z_loss = z_loss / is_read.sum()
        scale = logprob.detach().exp() if self.use_token_scaling else torch.ones_like(lse)
        loss, z_loss = (cross_entropy + z_loss) * scale, z_loss.detach() * scale
        if self.reduction == "none":
            return loss, z_loss
        # Rows that are ignored were divided by a count of 0 where there is no other.
        return loss.where(is_read, 0.0).sum(), z_loss.where(is_read, 0.0).sum()

    def _smoothed_rows(self, head: Operands, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N] smoothed cross entropy, lse, and log-probability of the target, by torch on chunks of logits."""
        class_weight = None if self.ce_weight is None else self.ce_weight.float()

        def of_chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
            z = LogitMap(softcap=self.softcap).apply(functional.linear(hidden, weight, bias).float())
            smoothed = functional.cross_entropy(
                z, labels, class_weight, ignore_index=-1, reduction="none", label_smoothing=self.label_smoothing
            )
            plain = -functional.cross_entropy(z, labels, ignore_index=-1, reduction="none")
            return torch.stack([smoothed, z.logsumexp(-1), plain])

        found = [
            checkpoint(of_chunk, head.hidden[rows], head.weight, head.bias, target[rows], use_reentrant=False)
            for rows in _chunks(head)
        ]
        cross_entropy, lse, logprob = torch.cat(found, 1)
        return cross_entropy, lse, logprob

    @torch.no_grad()
    def _shown_z_loss(self, head: Operands, target: Tensor, is_read: Tensor) -> Tensor:
        """[] the part of the loss that is z-loss."""
        lse = linear_logprob(head.hidden, head.weight, target, bias=head.bias, softcap=self.softcap).lse
        total = (self.lse_square_scale * lse.square()).where(is_read, 0.0).sum()
        return total / is_read.sum().clamp(min=1) if self.reduction == "mean" else total


@torch.no_grad()
def _predicted(head: Operands) -> Tensor:
    """[N] the most likely token of every row; a cap does not change it."""
    found = [functional.linear(head.hidden[rows], head.weight, head.bias).argmax(-1) for rows in _chunks(head)]
    return torch.cat(found)


def _chunks(head: Operands) -> list[slice]:
    """Rows worked on together; one empty chunk of an empty batch."""
    rows = len(head.hidden)
    return list(chunks(rows, default_chunk_rows(rows, len(head.weight), head.hidden.device))) or [slice(0, 0)]
