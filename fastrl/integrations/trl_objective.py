"""TRL's GRPO loss as a rule per token, where it is one: `fastrl.losses` with TRL's settings and weights.

Losses whose weights are known before the forward pass (grpo, bnpo, dr_grpo, dapo, cispo, sapo, by token) are. Those in
which a token's loss depends on the log-probabilities of others (sequence-level ratios, luspo, vespo, the off-policy
mask, the entropy quantile) are not: they need all log-probabilities first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastrl.integrations.trl_head import TokenRule
from fastrl.losses import surrogate
from fastrl.losses.kl import k3

BY_TOKEN = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def is_by_token(trainer: Any) -> bool:
    """Whether a GRPO trainer's loss is a sum over tokens with weights known before the forward pass."""
    return (
        trainer.loss_type in BY_TOKEN
        and trainer.importance_sampling_level == "token"
        and trainer.off_policy_mask_threshold is None
        and trainer.top_entropy_quantile >= 1.0
    )


def token_rule(trainer: Any, inputs: dict[str, Any]) -> TokenRule:
    """The loss of each token of a batch that TRL's GRPO trainer prepared, weight included.

    Args:
        trainer: whose settings count; `is_by_token`.
        inputs: TRL's batch of S sequences: prompt_ids [S, P], completion_ids [S, K], advantages [S] or [S, K], and
            what TRL adds to them.

    Returns:
        (logprob [C], entropy [C], places [C] among the S (P + K - 1) labels) -> loss [C].
    """
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    advantage = inputs["advantages"]
    advantage = advantage[:, None] if advantage.dim() == 1 else advantage
    columns = {
        "weight": _weight(trainer, inputs, mask),
        "entropy_weight": _entropy_weight(trainer, mask),
        "advantage": advantage,
        "old": inputs.get("old_per_token_logps"),
        "ref": inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
    }
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        columns["correction"] = inputs["importance_sampling_ratio"]
    before = inputs["prompt_ids"].shape[1] - 1
    constant = {
        name: functional.pad(value.expand(mask.shape), (before, 0)).flatten()
        for name, value in columns.items()
        if value is not None
    }
    loss_of = _surrogate(trainer)
    beta, corrects_kl = trainer.beta, trainer.args.use_bias_correction_kl

    def rule(logprob: Tensor, entropy: Tensor, places: Tensor) -> Tensor:
        at = {name: value[places] for name, value in constant.items()}
        log_ratio = logprob - at.get("old", logprob.detach())
        loss = loss_of(log_ratio, at["advantage"])
        if "correction" in at:
            loss = loss * at["correction"]
        if "ref" in at:
            estimate = k3(logprob, at["ref"])
            loss = loss + beta * (estimate * log_ratio.exp() if corrects_kl else estimate)
        loss = at["weight"] * loss
        return loss - at["entropy_weight"] * entropy if "entropy_weight" in at else loss

    return rule


def _surrogate(trainer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if trainer.loss_type == "cispo":
        return partial(surrogate.cispo, high=trainer.epsilon_high)
    if trainer.loss_type == "sapo":
        return partial(
            surrogate.sapo,
            temperature_positive=trainer.args.sapo_temperature_pos,
            temperature_negative=trainer.args.sapo_temperature_neg,
        )
    return partial(surrogate.clipped, low=trainer.epsilon_low, high=trainer.epsilon_high, delta=trainer.args.delta)


def _weight(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """[S, K] share of each token in the optimizer step's loss, by TRL's rule for the loss type."""
    accumulation = _accumulation(trainer)
    mask = mask.to(torch.float32)
    if trainer.loss_type in ("grpo", "sapo"):
        return mask / mask.sum(-1, keepdim=True).clamp(min=1.0) / (len(mask) * accumulation)
    if trainer.loss_type == "bnpo":
        return mask / mask.sum().clamp(min=1.0) / accumulation
    if trainer.loss_type == "dr_grpo":
        longest: int = trainer.max_completion_length
        return mask / (len(mask) * longest * accumulation)
    # The number of tokens is that of the generation batch, on all processes; it is brought to one optimizer step.
    tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    steps = accumulation / trainer.args.steps_per_generation if trainer.model.training else 1.0
    return mask / (tokens * steps)


def _entropy_weight(trainer: Any, mask: Tensor) -> Tensor | None:
    """[S, K] share of each token's entropy in the bonus, with its coefficient of this step; None without one."""
    if not trainer._entropy_bonus_enabled:
        return None
    coef: float = trainer.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coef = 0.0
    return coef * mask / mask.sum().clamp(min=1.0) / _accumulation(trainer)


def _accumulation(trainer: Any) -> float:
    return float(trainer.current_gradient_accumulation_steps) if trainer.model.training else 1.0
