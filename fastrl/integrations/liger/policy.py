"""What Liger's GRPO computes from log-probabilities, in the words of `fastrl.losses`.

    token loss = correction surrogate(ratio, A) + beta k3(l, l_ref)        loss = sum weight token loss

Both of its forms, over a head and over logits, differ only in where log-probabilities come from. All tensors are
[B, T], or rows of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl import losses

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
UNCLIPPED = ("sapo", "vespo")


@dataclass(frozen=True, slots=True)
class Objective:
    """Liger's numbers under Liger's names.

    Attributes:
        loss_type: one of LOSS_TYPES.
        importance_sampling_level: "token", or "sequence" for the ratio of the whole sequence (GSPO).
        beta: coefficient of the KL to the reference.
        epsilon_low, epsilon_high: the clip; for cispo epsilon_high caps the ratio itself.
        delta: cap of the ratio before the minimum, None for none.
        use_bias_correction_kl: multiply the KL by the ratio.
        sapo_temperature: for A > 0 and for the rest.
        vespo: power and decay for A >= 0, power and decay for A < 0.
        max_completion_length: dr_grpo's constant.
    """

    loss_type: str
    importance_sampling_level: str
    beta: float
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    use_bias_correction_kl: bool
    sapo_temperature: tuple[float, float]
    vespo: tuple[float, float, float, float]
    max_completion_length: int | None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"Unknown loss_type {self.loss_type!r}: one of {', '.join(LOSS_TYPES)}")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level must be 'token' or 'sequence', got {self.importance_sampling_level!r}"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type='{self.loss_type}': use 'token'"
            )
        if self.loss_type == "sapo" and min(self.sapo_temperature) <= 0:
            raise ValueError(f"sapo_temperature_pos and _neg must be positive, got {self.sapo_temperature}")
        if self.delta is not None and self.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(f"delta (two-sided clipping) is not supported for loss_type='{self.loss_type}'.")
        if self.delta is not None and self.delta <= 0:
            raise ValueError(f"delta must be positive, got {self.delta}")

    def is_sequence_coupled(self) -> bool:
        """Whether a token's loss needs log-probabilities of the others."""
        return self.importance_sampling_level == "sequence"


class Constants(NamedTuple):
    """What is known before the loss: [B, T] each, or its rows; None where absent."""

    advantage: Tensor
    old_logprob: Tensor | None
    ref_logprob: Tensor | None  # None: the policy itself
    correction: Tensor | None  # trainer's over sampler's probability
    gamma: Tensor | None  # vespo's weight

    def rows(self, index: Tensor) -> Constants:
        """Some of the flattened tokens."""
        return Constants(*(None if x is None else x.reshape(-1)[index] for x in self))  # type: ignore[arg-type]


def constants(
    advantages: Tensor, old_logprob: Tensor | None, ref_logprob: Tensor | None, correction: Tensor | None, mask: Tensor
) -> Constants:
    """advantages [B], log-probabilities [B, T], correction as `by_token` gives it -> Constants, checked.

    Raises:
        ValueError: another shape, which would be stretched over other tokens than were meant.
    """
    given = {"advantages": advantages, "old log-probabilities": old_logprob, "reference log-probabilities": ref_logprob}
    for name, tensor in given.items():
        expected = mask.shape[:1] if name == "advantages" else mask.shape
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name} must be {list(expected)}, got shape {tuple(tensor.shape)}")
    old, ref = (None if x is None else x.detach().float() for x in (old_logprob, ref_logprob))
    return Constants(advantages.detach().float()[:, None].expand_as(mask), old, ref, correction, None)


def token_log_ratio(logprob: Tensor, constants: Constants) -> Tensor:
    """l - l_old, with l_old = stop(l) where there is none."""
    old = logprob.detach() if constants.old_logprob is None else constants.old_logprob
    return logprob - old


def log_ratio(objective: Objective, logprob: Tensor, constants: Constants, mask: Tensor) -> Tensor:
    """[B, T] the log-ratio that the surrogate sees: the token's own, or its sequence's mean over `mask`."""
    own = token_log_ratio(logprob, constants)
    if objective.importance_sampling_level == "token":
        return own
    return ((own * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(own)


def token_loss(objective: Objective, logprob: Tensor, log_ratio: Tensor, constants: Constants) -> Tensor:
    """Loss per token, unweighted; differentiable by logprob and log_ratio. Shapes are all alike."""
    advantage, numbers = constants.advantage, objective
    if numbers.loss_type == "cispo":
        loss = losses.reinforce(logprob, losses.truncate(log_ratio, high=numbers.epsilon_high) * advantage)
    elif numbers.loss_type == "sapo":
        positive, negative = numbers.sapo_temperature
        loss = losses.sapo(log_ratio, advantage, temperature_positive=positive, temperature_negative=negative)
    elif numbers.loss_type == "vespo":
        assert constants.gamma is not None
        loss = losses.reinforce(logprob, constants.gamma * advantage)
    else:
        low, high = numbers.epsilon_low, numbers.epsilon_high
        loss = losses.clipped(log_ratio, advantage, low=low, high=high, delta=numbers.delta)
    if constants.correction is not None and numbers.loss_type != "vespo":  # vespo's gamma has it already
        loss = loss * constants.correction
    return loss + numbers.beta * kl(numbers, logprob, log_ratio, constants) if numbers.beta else loss


def kl(objective: Objective, logprob: Tensor, log_ratio: Tensor, constants: Constants) -> Tensor:
    """k3 per token, times the ratio where it is corrected."""
    ref = logprob.detach() if constants.ref_logprob is None else constants.ref_logprob
    estimate = losses.k3(logprob, ref)
    return estimate * log_ratio.exp() if objective.use_bias_correction_kl else estimate


def is_clipped(objective: Objective, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Bool: the clip, or cispo's cap, binds in the direction that the advantage pushes."""
    ratio = log_ratio.exp()
    if objective.loss_type in UNCLIPPED:
        return torch.zeros_like(ratio, dtype=torch.bool)
    if objective.loss_type == "cispo":
        return (ratio > objective.epsilon_high) & (advantage > 0)
    too_low = (ratio < 1 - objective.epsilon_low) & (advantage < 0)
    return too_low | ((ratio > 1 + objective.epsilon_high) & (advantage > 0))


def with_gamma(objective: Objective, logprob: Tensor, constants: Constants, mask: Tensor) -> Constants:
    """The constants with vespo's weight of each sequence, from log-probabilities [B, T] without gradient."""
    own = losses.token_ratio(token_log_ratio(logprob.detach(), constants), mask, mask, limit=20.0)
    log_weight = (own * mask).sum(-1, keepdim=True)
    if constants.correction is not None:
        # Liger adds the sampler's ratio over all places, and one number for a sequence once.
        log_weight = log_weight + constants.correction.log().clamp(math.log(1e-8), 20.0).sum(-1, keepdim=True)
    power_positive, decay_positive, power_negative, decay_negative = objective.vespo
    gamma = losses.gamma_weight(
        log_weight,
        constants.advantage[:, :1],
        power_positive=power_positive,
        decay_positive=max(decay_positive, 1e-4),
        power_negative=power_negative,
        decay_negative=max(decay_negative, 1e-4),
    )
    return constants._replace(gamma=gamma.expand_as(logprob))


def token_weight(objective: Objective, mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """[B, T] each token's share of the loss, as Liger averages: masked sequences stay in B, ranks share one count.

    luspo's covers masked tokens too: it is the mean over all places of loss times sequence length.
    """
    sequences, tokens = mask.shape
    length = mask.sum(-1, keepdim=True)
    if objective.loss_type in ("grpo", "sapo"):
        return mask / (length.clamp(min=1) * sequences)
    if objective.loss_type == "bnpo":
        return mask / mask.sum().clamp(min=1)
    if objective.loss_type == "dr_grpo":
        return mask / (sequences * (objective.max_completion_length or tokens))
    if objective.loss_type == "luspo":
        return (length / (sequences * tokens)).expand_as(mask)
    return mask / _tokens_per_rank(mask, num_items_in_batch)


def _tokens_per_rank(mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items_in_batch is not None:
        total = torch.as_tensor(num_items_in_batch, device=mask.device).to(mask.dtype)
    else:
        total = mask.sum()
        if ranks > 1:
            dist.all_reduce(total)
    return (total / ranks).clamp(min=1)


def by_token(correction: Tensor | None, mask: Tensor) -> Tensor | None:
    """vllm_is_ratio [B], [B, 1] or [B, T] -> [B, 1] or [B, T] float32, checked."""
    if correction is None:
        return None
    sequences, tokens = mask.shape
    if tuple(correction.shape) not in ((sequences,), (sequences, 1), (sequences, tokens)):
        raise ValueError(
            f"vllm_is_ratio must be [{sequences}], [{sequences}, 1] or [{sequences}, {tokens}], got shape "
            f"{tuple(correction.shape)}"
        )
    return correction.reshape(sequences, -1).float()
