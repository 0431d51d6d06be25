"""The losses of a PPO update, as `update` calls them: policy (with pretraining text), critic, or both on one backbone.

policy   sum w clipped(ratio, A) + ptx_coef mean NLL of the pretraining tokens
critic   vf_coef sum w max((V - R)^2, (clip(V, V_old +- c) - R)^2) / 2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.algorithms.policy_gradient import PolicyGradient, policy_loss
from fastrl.losses.value import value_clipped, value_is_clipped, value_squared
from fastrl.train.config import PPOConfig
from fastrl.train.model import hidden_states, model_head
from fastrl.train.update import BatchLoss, policy_batch_loss, supervised_batch_loss
from fastrl.types import LossOutput, TokenBatch

Values = Callable[[TokenBatch], Tensor]


def policy_update_loss(config: PPOConfig, policy: PreTrainedModel, algorithm: PolicyGradient) -> BatchLoss:
    """PPO's clipped surrogate, in one pass over the head, and the likelihood of pretraining text where there is any.

    A batch without advantages is pretraining text; its weights hold ptx_coef already (`pretrain_batches`).

    Source: Schulman 2017, arXiv:1707.06347, eq. 7; Ouyang 2022, arXiv:2203.02155, eq. 2 (gamma is ptx_coef).
    """
    surrogate = policy_batch_loss(policy, algorithm, config.kernels, temperature=config.temperature)
    return _with_pretraining(config, policy, surrogate)


def value_update_loss(config: PPOConfig, values: Values) -> BatchLoss:
    """The critic's loss times vf_coef.

    Args:
        values: batch -> [T] value of the state in which `target[t]` is chosen; differentiable.
    """

    def loss(batch: TokenBatch) -> LossOutput:
        return value_output(config, values(batch), batch)

    return loss


def joint_update_loss(
    config: PPOConfig, policy: PreTrainedModel, algorithm: PolicyGradient, value_head: torch.nn.Linear
) -> BatchLoss:
    """Both losses on one pass through the backbone: `share_backbone`."""

    def joint(batch: TokenBatch) -> LossOutput:
        hidden = hidden_states(policy, batch)
        moved = policy_loss(
            algorithm,
            hidden,
            model_head(policy, temperature=config.temperature),
            batch,
            chunk_rows=config.kernels.chunk_rows,
            skip_tolerance=config.kernels.skip_tolerance,
            backend=config.kernels.backend,
        )
        fitted = value_output(config, head_values(value_head, hidden), batch)
        return LossOutput(moved.loss + fitted.loss, moved.metrics, fitted.item_metrics)

    return _with_pretraining(config, policy, joint)


def head_values(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """[T, D] hidden states -> [T] f32 values; index t has seen `input_ids[..t]`, and not `target[t]`."""
    return head(hidden.to(head.weight.dtype))[:, 0].float()  # type: ignore[no-any-return]


def value_output(config: PPOConfig, value: Tensor, batch: TokenBatch) -> LossOutput:
    """The weighted loss of values [T], and under TRL's names its mean without vf_coef and how often the clip binds."""
    assert batch.old_value is not None
    assert batch.returns is not None
    rows = batch.weight.nonzero()[:, 0]
    value, old, returns = value[rows], batch.old_value[rows], batch.returns[rows]
    clip = config.cliprange_value
    if clip is None:
        token, is_clipped = value_squared(value, returns), torch.zeros_like(value)
    else:
        token = value_clipped(value, old, returns, clip=clip)
        is_clipped = value_is_clipped(value.detach(), old, returns, clip=clip).float()
    loss = config.vf_coef * (batch.weight[rows] * token).sum()
    return LossOutput(loss, item_metrics={"loss/value_avg": token.detach(), "val/clipfrac_avg": is_clipped})


def _with_pretraining(config: PPOConfig, policy: PreTrainedModel, rollouts: BatchLoss) -> BatchLoss:
    text = supervised_batch_loss(policy, config.kernels, label_smoothing=0.0)

    def loss(batch: TokenBatch) -> LossOutput:
        if batch.advantage is not None:
            output = rollouts(batch)
            square = output.metrics["ratio"].log().square() / 2  # TRL's estimate; ours, "approx_kl", is k3
            return replace(output, metrics={**output.metrics, "policy/approxkl_avg": square})
        output = text(batch)
        return LossOutput(output.loss, {"loss/ptx_avg": -output.metrics["logps"]})

    return loss
