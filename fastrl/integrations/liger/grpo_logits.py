"""Liger's GRPO over logits that exist already, and its selective log-softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrl.integrations.liger import policy
from fastrl.integrations.liger.head import read_target
from fastrl.integrations.liger.policy import Objective
from fastrl.ops import logits_logprob


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the last L tokens, as Liger's function of this name: without gradient.

    Args:
        logits: [B, L + 1, V]; the last one predicts a token that is not there.
        input_ids: [B, at least L] int64.
        temperature: divides the logits.
        mask: [B, at least L] tokens where it is 0 get 0.

    Returns:
        [B, L] float32, nats.
    """
    tokens = logits.shape[1] - 1
    kept = None if mask is None else mask[:, -tokens:]
    return _logprob(logits, input_ids[:, -tokens:], kept, temperature)


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Any:
    """GRPO's loss from logits, as Liger's function of this name.

    Args:
        logits: [B, L + 1, V]; differentiable. The last one predicts a token that is not there.
        old_logp, ref_logp: [B, L] or None; ref_logp is needed where beta is not 0.
        completion_ids: [B, L] int64.
        advantages: [B].
        completion_mask: [B, L]; None is all.
        inplace: accepted; the gradient always gets memory of its own, so the logits stay as they were.
        delta: cap of the ratio; not for cispo, sapo and vespo.
        reduce: return (loss [], [mean KL where beta is not 0, share of clipped tokens]).
        vllm_is_ratio: [B], [B, 1] or [B, L], multiplied onto the surrogate, not onto the KL.

    Returns:
        (loss, KL or None, is clipped), [B, L] float32 each and 0 where masked; with reduce see there. Only the loss has
        a gradient.
    """
    if beta != 0 and ref_logp is None:
        raise ValueError("beta is not 0: pass ref_logp [B, L], the reference's log-probabilities, or set beta=0")
    objective = Objective(
        loss_type,
        importance_sampling_level,
        beta,
        eps_low,
        eps_high,
        delta,
        use_bias_correction_kl,
        (sapo_temperature_pos, sapo_temperature_neg),
        (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
        max_completion_length,
    )
    logprob = _logprob(logits, completion_ids, completion_mask, temperature)
    mask = torch.ones_like(logprob) if completion_mask is None else completion_mask.float()
    correction = policy.by_token(vllm_is_ratio, mask)
    if correction is not None:
        correction = correction.expand_as(mask)
    constants = policy.constants(advantages, old_logp, ref_logp, correction, mask)
    if loss_type == "vespo":
        constants = policy.with_gamma(objective, logprob, constants, mask)
    ratio = policy.log_ratio(objective, logprob, constants, mask)
    per_token = policy.token_loss(objective, logprob, ratio, constants).where(mask != 0, 0.0) * mask
    kl = None
    if beta != 0:
        kl = policy.kl(objective, logprob, ratio, constants).detach().where(mask != 0, 0.0) * mask
    clipped = policy.is_clipped(objective, ratio.detach(), constants.advantage) * mask
    if not reduce:
        return per_token, kl, clipped
    loss = (policy.token_weight(objective, mask, num_items_in_batch) * per_token).sum()
    tokens = mask.sum().clamp(min=1)
    return loss, [x.sum() / tokens for x in (kl, clipped) if x is not None]


def _logprob(logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """[B, L] of ids, 0 where masked; differentiable. The last logits stay in, as a cut would copy all of them."""
    sequences, tokens = ids.shape
    if logits.shape[:2] != (sequences, tokens + 1) or (mask is not None and mask.shape != ids.shape):
        raise ValueError(
            f"logits must be [{sequences}, {tokens + 1}, V] for ids of shape {tuple(ids.shape)}, and a mask like the "
            f"ids, got {tuple(logits.shape)} and {None if mask is None else tuple(mask.shape)}"
        )
    is_read = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    target = read_target(ids, is_read, logits.shape[-1])
    flat = logits.reshape(sequences * (tokens + 1), logits.shape[-1])
    found = logits_logprob(flat, pad(target, (0, 1), value=-1).flatten(), temperature=temperature).logprob
    return found.reshape(sequences, tokens + 1)[:, :tokens]
