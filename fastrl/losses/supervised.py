"""Supervised losses of one token: `(logprob [C], entropy [C], rows [C]) -> [C]`, as `linear_token_loss` calls them."""

from __future__ import annotations

from torch import Tensor


def nll(logprob: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
    """[C] -l, the negative log-likelihood, nats; gradient -1."""
    return -logprob


def dft(logprob: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
    """[C] -stop(p) l, p = exp(l): likelihood weighted by the token's own probability; gradient -p.

    It cancels the 1 / p with which plain NLL pushes unlikely tokens.

    Source: Wu 2025, arXiv:2508.05629 (dynamic fine-tuning); TRL `loss_type="dft"`.
    """
    return -logprob.detach().exp() * logprob


def label_smoothed(logprob: Tensor, mean_logprob: Tensor, *, smoothing: float) -> Tensor:
    """[C] -(1 - smoothing) l - smoothing mean over the vocabulary of log p.

    The second term needs every logit of the row, so it is no `loss_fn` of the single pass: training uses
    `ops.linear_cross_entropy(label_smoothing=)`, whose meaning this is.

    Args:
        logprob: [C] of the target, nats; differentiable.
        mean_logprob: [C] mean of log p over the V classes, nats; differentiable.
        smoothing: share of the target's probability spread evenly over all V classes, the target included.

    Source: Szegedy 2016, arXiv:1512.00567, sec. 7; torch `cross_entropy(label_smoothing=)`.
    """
    return -(1 - smoothing) * logprob - smoothing * mean_logprob
