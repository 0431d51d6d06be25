"""One optimizer step over packed micro-batches: forward, loss over the waist, backward, guard, step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fastrl.algorithms.policy_gradient import PolicyGradient, policy_loss
from fastrl.losses.supervised import nll
from fastrl.ops.linear_cross_entropy import linear_cross_entropy
from fastrl.ops.linear_token_loss import LossFunction, linear_token_loss
from fastrl.train.config import KernelsBlock, TrainConfig
from fastrl.train.metrics import means_of, sums_of, sums_of_all_ranks
from fastrl.train.model import hidden_states, model_head
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.shares import own_batches
from fastrl.train.step import optimizer_step
from fastrl.types import LossOutput, TokenBatch

# The loss of one micro-batch: it runs the model itself and may differentiate inside its forward pass.
BatchLoss = Callable[[TokenBatch], LossOutput]


def update(
    optimizer: MasterAdamW,
    batch_loss: BatchLoss,
    batches: Sequence[TokenBatch],
    config: TrainConfig,
    *,
    lr: float,
    step: int,
) -> dict[str, float]:
    """Accumulate the micro-batches' gradients and take one optimizer step.

    Weights are shares of the whole step, so the losses add, over micro-batches and over ranks, and nothing is scaled.
    A step without a micro-batch (no completion has a gradient) leaves weights and optimizer state alone.

    Args:
        batches: of the whole step, the same on every rank; each runs its own through the model.
        step: number of the step, for messages.

    Returns:
        `loss`, `grad_norm`, `learning_rate`, `skipped_step`, and the means of the loss's metrics.
    """
    if not batches:
        return {"loss": 0.0, "grad_norm": 0.0, "learning_rate": lr, "skipped_step": 1.0}
    pairs: list[tuple[LossOutput, TokenBatch]] = []
    for batch in own_batches(batches):
        output = batch_loss(batch)
        output.loss.backward()  # type: ignore[no-untyped-call]
        pairs.append((replace(output, loss=output.loss.detach()), batch))  # the graph goes, with its gradients
    sums = sums_of_all_ranks(sums_of(pairs))
    optimizer.sum_gradients()
    result = optimizer_step(
        optimizer,
        sums.loss,
        lr=lr,
        max_grad_norm=config.max_grad_norm,
        on_nonfinite=config.on_nonfinite,
        step=step,
    )
    means = means_of(sums, grad_norm=result.grad_norm)
    return means | {"learning_rate": lr, "skipped_step": float(result.skipped is not None)}


def policy_batch_loss(
    model: PreTrainedModel, algorithm: PolicyGradient, kernels: KernelsBlock, *, temperature: float
) -> BatchLoss:
    """The loss of a policy-gradient algorithm, as `update` calls it; `temperature` divides the logits."""

    def loss(batch: TokenBatch) -> LossOutput:
        return policy_loss(
            algorithm,
            hidden_states(model, batch),
            model_head(model, temperature=temperature),
            batch,
            chunk_rows=kernels.chunk_rows,
            skip_tolerance=kernels.skip_tolerance,
            backend=kernels.backend,
        )

    return loss


def supervised_batch_loss(
    model: PreTrainedModel, kernels: KernelsBlock, *, token_loss: LossFunction = nll, label_smoothing: float = 0.0
) -> BatchLoss:
    """A supervised loss over trained tokens, as `update` calls it; entropy is logged where it costs nothing.

    Args:
        token_loss: `nll` or `dft` of `fastrl.losses.supervised`.
        label_smoothing: above 0 it is smoothed cross entropy, whatever `token_loss` says.
    """

    def smoothed(batch: TokenBatch) -> LossOutput:
        head = model_head(model)
        loss = linear_cross_entropy(
            hidden_states(model, batch),
            head.weight,
            batch.target,
            token_weight=batch.weight,
            label_smoothing=label_smoothing,
            bias=head.bias,
            temperature=head.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            chunk_rows=kernels.chunk_rows,
            backend=kernels.backend,
        )
        return LossOutput(loss, {})

    def plain(batch: TokenBatch) -> LossOutput:
        head = model_head(model)
        result = linear_token_loss(
            hidden_states(model, batch),
            head.weight,
            batch.target,
            token_loss,
            row_weight=batch.weight,
            skip_tolerance=kernels.skip_tolerance,
            bias=head.bias,
            temperature=head.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            chunk_rows=kernels.chunk_rows,
            backend=kernels.backend,
        )
        return LossOutput(result.loss, {"entropy": result.stats.entropy, "logps": result.stats.logprob})

    return smoothed if label_smoothing > 0 else plain


@torch.no_grad()
def mean_loss(batch_loss: BatchLoss, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Loss and metrics without gradient, for held-out data: at least one batch, the same ones on every rank."""
    return means_of(sums_of_all_ranks(sums_of((batch_loss(batch), batch) for batch in own_batches(batches))))
