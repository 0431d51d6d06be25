"""Liger's GRPO over a linear head: one pass over the logits, which never exist whole."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastrl.integrations.liger import policy
from fastrl.integrations.liger.head import Operands, operands, read_target, token_logprob
from fastrl.integrations.liger.policy import Constants, Objective
from fastrl.ops import linear_token_loss


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """`loss(_input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps, ..)`.

    Returns `(loss, metrics)` with metrics (mean KL where beta is not 0, share of clipped tokens). `_input` is
    [B, T, D], advantages [B], the rest [B, T]; `vllm_is_ratio` [B], [B, 1] or [B, T]. Token-level objectives are
    differentiated inside the chunk loop (6 N D V over trained tokens); the sequence-level one and vespo need the
    log-probabilities of the sequence first. `compiled` and `chunk_size` are accepted, kept as attributes, and change
    no number here. delta with cispo, sapo or vespo, where Liger ignores it, is refused.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if sapo_temperature_pos <= 0:
            raise ValueError(f"sapo_temperature_pos must be positive, got {sapo_temperature_pos}")
        if sapo_temperature_neg <= 0:
            raise ValueError(f"sapo_temperature_neg must be positive, got {sapo_temperature_neg}")
        if delta is not None and delta <= 0:
            raise ValueError(f"delta must be positive, got {delta}")
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length, self.importance_sampling_level = max_completion_length, importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As in the class."""
        objective, mask = self._objective(), attention_mask.float()
        if mask.shape != selected_token_ids.shape:
            raise ValueError(
                f"attention_mask must have the tokens' shape {tuple(selected_token_ids.shape)}, got {tuple(mask.shape)}"
            )
        head = operands(_input, lin_weight, bias)
        weight = policy.token_weight(objective, mask, num_items_in_batch)
        ref = self._reference(selected_token_ids, weight != 0, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        correction = policy.by_token(vllm_is_ratio, mask)
        constants = policy.constants(advantages, old_per_token_logps, ref, correction, mask)
        if objective.loss_type == "vespo":
            with torch.no_grad():
                first = token_logprob(head, selected_token_ids, mask != 0, temperature=self.temperature)
            constants = policy.with_gamma(objective, first, constants, mask)
        if correction is not None:
            constants = constants._replace(correction=correction.expand_as(mask))
        run = _whole_sequences if objective.is_sequence_coupled() else _single_pass
        loss, logprob = run(objective, head, selected_token_ids, constants, weight, mask, self.temperature)
        return loss, _metrics(objective, logprob, constants, mask)

    def _reference(
        self,
        target: Tensor,
        is_read: Tensor,
        logps: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        """[B, T] log-probabilities of the reference; None where none is used."""
        if not self.use_ref_model or (self.beta == 0 and logps is None):
            return None
        if logps is not None:
            if hidden is not None:
                warnings.warn("ref_per_token_logps and ref_input were both given: ref_input is not used", stacklevel=3)
            return logps
        if hidden is None or weight is None:
            raise ValueError("use_ref_model needs ref_per_token_logps, or ref_input and ref_weight")
        with torch.no_grad():
            return token_logprob(operands(hidden, weight, bias), target, is_read, temperature=self.temperature)

    def _objective(self) -> Objective:
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length")
        return Objective(
            self.loss_type,
            self.importance_sampling_level,
            self.beta,
            self.epsilon_low,
            self.epsilon_high,
            self.delta,
            self.use_bias_correction_kl,
            (self.sapo_temperature_pos, self.sapo_temperature_neg),
            (self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg),
            self.max_completion_length,
        )


def _single_pass(
    objective: Objective,
    head: Operands,
    target: Tensor,
    constants: Constants,
    weight: Tensor,
    mask: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and log-probabilities [B, T] without gradient, 0 where the weight is."""

    def loss_fn(logprob: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        of_rows = constants.rows(rows)
        return policy.token_loss(objective, logprob, policy.token_log_ratio(logprob, of_rows), of_rows)

    found = linear_token_loss(
        head.hidden,
        head.weight,
        read_target(target, weight != 0, len(head.weight)).flatten(),
        loss_fn,
        bias=head.bias,
        temperature=temperature,
        row_weight=weight.flatten(),
    )
    return found.loss, found.stats.logprob.reshape(mask.shape)


def _whole_sequences(
    objective: Objective,
    head: Operands,
    target: Tensor,
    constants: Constants,
    weight: Tensor,
    mask: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`_single_pass` where a ratio belongs to a sequence: its log-probabilities first, their gradient afterwards."""
    logprob = token_logprob(head, target, weight != 0, temperature=temperature)
    ratio = policy.log_ratio(objective, logprob, constants, mask)
    per_token = policy.token_loss(objective, logprob, ratio, constants)
    return (weight * per_token.where(weight != 0, 0.0)).sum(), logprob.detach()


def _metrics(objective: Objective, logprob: Tensor, constants: Constants, mask: Tensor) -> tuple[Tensor, ...]:
    """Means over the trained tokens, without gradient: the KL where beta is not 0, and the share that is clipped."""
    ratio, tokens = policy.log_ratio(objective, logprob, constants, mask), mask.sum().clamp(min=1)
    clipped = (policy.is_clipped(objective, ratio, constants.advantage) * mask).sum() / tokens
    if objective.beta == 0:
        return (clipped,)
    kl = policy.kl(objective, logprob, ratio, constants).where(mask != 0, 0.0)
    return (kl * mask).sum() / tokens, clipped
