"""Liger's losses of preference pairs: DPO and its relatives, ORPO, CPO, SimPO.

    loss = alpha nll(chosen) + mean over pairs of the loss of `fastrl.losses`

`_input` [2P, T, D] and `target` [2P, T] hold the chosen sequences first and the rejected ones after them. Every loss
returns `(loss, metrics)` with metrics (chosen logps [P], rejected logps [P], mean chosen logit, mean rejected logit,
nll, chosen rewards [P], rejected rewards [P], ..). `compiled` and `chunk_size` are about Liger's own kernels: they are
accepted, kept as attributes, and change no number here; rows per chunk follow a memory budget.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl import losses
from fastrl.integrations.liger.head import Operands, logit_sum, operands, sequence_logprob

PairLoss = Callable[[Tensor, Tensor], Tensor]
Output = tuple[Tensor, tuple[Tensor, ...]]

DPO_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": losses.sigmoid,
    "hinge": losses.hinge,
    "exo_pair": losses.exo_pair,
    "nca_pair": losses.nca_pair,
    "robust": losses.robust,
    "bco_pair": losses.bco_pair,
    "sppo_hard": losses.sppo_hard,
    "apo_zero": losses.apo_zero,
    "apo_down": losses.apo_down,
    "discopop": losses.discopop,
}


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """`loss(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)`; see the module.

    Scores are log-ratios to the reference; without `use_ref_model` log-probabilities. `label_smoothing` is read by
    exo_pair and robust alone, `discopop_tau` by discopop, as Liger does.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in DPO_LOSSES:
            raise ValueError(f"Unsupported loss_type: {loss_type}. Supported types are: {', '.join(DPO_LOSSES)}")
        if loss_type == "exo_pair" and label_smoothing <= 0:
            raise ValueError("label_smoothing must be > 0 for loss_type='exo_pair'; the paper uses 1e-3")
        if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', got {label_smoothing}")
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.use_ref_model, self.average_log_prob = compiled, use_ref_model, average_log_prob
        self.chunk_size, self.loss_type = chunk_size, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Output:
        """As in the class."""
        head = _pairs(_input, lin_weight, bias, target)
        average = partial(sequence_logprob, ignore_index=self.ignore_index, average=self.average_log_prob)
        logprob = average(head, target)
        score = logprob
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model needs ref_input and ref_weight; pass them or set use_ref_model=False")
            with torch.no_grad():
                reference = average(operands(ref_input, ref_weight, ref_bias), target)
            score = logprob - reference
        options: dict[str, float] = {}
        if self.loss_type in ("exo_pair", "robust"):
            options["label_smoothing"] = self.label_smoothing
        if self.loss_type == "discopop":
            options["tau"] = self.discopop_tau
        pair_loss = partial(DPO_LOSSES[self.loss_type], beta=self.beta, **options)
        nll = _nll(head, target, logprob, self) if self.compute_nll_loss else None
        loss, metrics = _combined(head, target, logprob, pair_loss(*score.chunk(2)), nll, self.alpha)
        return loss, (*metrics, *(self.beta * score.detach()).chunk(2))


class LigerFusedLinearCPOLoss(torch.nn.Module):
    """`loss(lin_weight, _input, target, bias)`: DPO's sigmoid without a reference, plus alpha NLL; see the module."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled = compute_nll_loss, compiled
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Output:
        """As in the class."""
        head = _pairs(_input, lin_weight, bias, target)
        logprob = sequence_logprob(head, target, ignore_index=self.ignore_index, average=self.average_log_prob)
        per_pair = losses.sigmoid(*logprob.chunk(2), beta=self.beta, label_smoothing=self.label_smoothing)
        nll = _nll(head, target, logprob, self) if self.compute_nll_loss else None
        loss, metrics = _combined(head, target, logprob, per_pair, nll, self.alpha)
        return loss, (*metrics, *(self.beta * logprob.detach()).chunk(2))


class LigerFusedLinearSimPOLoss(torch.nn.Module):
    """`loss(lin_weight, _input, target, bias)` on averages per token, with the margin gamma; see the module."""

    average_log_prob = True

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled, self.gamma, self.chunk_size = (
            compute_nll_loss,
            compiled,
            gamma,
            chunk_size,
        )

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Output:
        """As in the class."""
        head = _pairs(_input, lin_weight, bias, target)
        logprob = sequence_logprob(head, target, ignore_index=self.ignore_index, average=True)
        per_pair = losses.simpo(
            *logprob.chunk(2), beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing
        )
        nll = _nll(head, target, logprob, self) if self.compute_nll_loss else None
        loss, metrics = _combined(head, target, logprob, per_pair, nll, self.alpha)
        return loss, (*metrics, *(self.beta * logprob.detach()).chunk(2))


class LigerFusedLinearORPOLoss(torch.nn.Module):
    """`loss(lin_weight, _input, target, bias, nll_target)`; metrics end with the means of log sigmoid(odds) and odds.

    `nll_target` [2P, T] replaces target in the NLL of the chosen sequences, which then is a second pass over them.
    """

    average_log_prob = True

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Output:
        """As in the class."""
        head = _pairs(_input, lin_weight, bias, target)
        logprob = sequence_logprob(head, target, ignore_index=self.ignore_index, average=True)
        per_pair = losses.orpo(*logprob.chunk(2), beta=self.beta)
        nll = _nll(head, target, logprob, self, nll_target) if self.compute_nll_loss else None
        loss, metrics = _combined(head, target, logprob, per_pair, nll, 1.0)
        with torch.no_grad():
            odds = losses.log_odds_ratio(*logprob.chunk(2))
        rewards = (self.beta * logprob.detach()).chunk(2)
        return loss, (*metrics, *rewards, logsigmoid(odds).mean(), odds.mean())


_Pairs = LigerFusedLinearDPOLoss | LigerFusedLinearCPOLoss | LigerFusedLinearSimPOLoss | LigerFusedLinearORPOLoss


def _pairs(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Operands:
    """The head of whole pairs."""
    if len(target) < 2 or len(target) % 2:
        raise ValueError(f"target must hold as many chosen sequences as rejected ones after them, got {len(target)}")
    return operands(hidden, weight, bias)


def _nll(head: Operands, target: Tensor, logprob: Tensor, loss: _Pairs, nll_target: Tensor | None = None) -> Tensor:
    """[] mean negative log-likelihood of the chosen sequences' tokens; from `logprob` unless they are others."""
    chosen = len(target) // 2
    labels = (target if nll_target is None else nll_target)[:chosen]
    is_read = labels != loss.ignore_index
    if nll_target is None:
        length = is_read.sum(-1)
        per_sequence = logprob[:chosen] * length if loss.average_log_prob else logprob[:chosen]
        # 0 x NaN: the mean of a sequence without tokens is none, its sum is 0.
        return -per_sequence.where(length > 0, 0.0).sum() / length.sum()
    if nll_target.shape != target.shape:
        raise ValueError(f"nll_target must have target's shape {tuple(target.shape)}, got {tuple(nll_target.shape)}")
    rows = Operands(head.hidden[: labels.numel()], head.weight, head.bias)
    total = sequence_logprob(rows, labels, ignore_index=loss.ignore_index, average=False).sum()
    return -total / is_read.sum()


def _combined(
    head: Operands, target: Tensor, logprob: Tensor, per_pair: Tensor, nll: Tensor | None, alpha: float
) -> Output:
    """The loss, and the metrics that all have."""
    loss = per_pair.sum() / len(per_pair)
    if nll is not None:
        loss = loss + alpha * nll
    per_logit = logit_sum(head, len(target)) / (len(per_pair) * target.shape[1] * len(head.weight))
    chosen, rejected = (half.sum() for half in per_logit.chunk(2))
    shown = torch.zeros_like(chosen) if nll is None else nll.detach()
    return loss, (*logprob.detach().chunk(2), chosen, rejected, shown)
