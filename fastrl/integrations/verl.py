"""verl's names over our waist and surrogates.

verl.utils.kernel.linear_cross_entropy.linear_cross_entropy = fastrl.integrations.verl.linear_cross_entropy
verl.utils.experimental.torch_functional.FusedLinearForPPO = fastrl.integrations.verl.FusedLinearForPPO
fastrl.integrations.verl.register()     # then actor.policy_loss.loss_mode=fastrl_clipped
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl import losses
from fastrl.integrations.liger.head import operands
from fastrl.ops import linear_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# [B, T] log-ratio, [B, T] advantage, the actor's configuration -> [B, T] loss per token
Surrogate = Callable[[Tensor, Tensor, Any], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a linear head, without logits; verl's kernel of this name.

    Args:
        hidden: [.., D]; differentiable.
        weight: [V, D], or this rank's equal part of the vocabulary with dist_process_group; differentiable.
        labels: [..] int64 ids of the whole vocabulary; [N] in all.
        temperature: divides the logits.
        reduction: of the log-probabilities: "none", "sum" or "mean", in any case. The entropies stay one per token.
        dist_process_group: ranks that hold the vocabulary together; hidden states are the same on each. As from verl's
            kernel, the sum of the ranks' d hidden is the gradient: verl's models add them up.

    Returns:
        (logprobs [N] or [], entropy [N]), float32, nats.

    Raises:
        ValueError: an unknown reduction, or shapes that do not fit.
    """
    reduction = reduction.lower()
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if dist_process_group is not None and hidden.requires_grad:
        hidden, ranks = hidden.view_as(hidden), dist.get_world_size(dist_process_group)
        hidden.register_hook(lambda whole: whole / ranks)  # the op has the whole on each rank, the caller adds up
    head = operands(hidden, weight, None)
    stats = linear_logprob(
        head.hidden, head.weight, labels.flatten(), temperature=temperature, process_group=dist_process_group
    )
    reduce: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}
    return reduce[reduction](stats.logprob), stats.entropy


class FusedLinearForPPO(torch.nn.Module):
    """`module(hidden_states, vocab_weights, input_ids, temperature)` -> (log_probs, entropy) in input_ids' shape.

    Both are in the dtype of hidden_states, as verl's are, but made in float32.
    """

    def __init__(self, chunk_size: int = 512) -> None:
        """Rows are worked on `chunk_size` at a time."""
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """As in the class."""
        head = operands(hidden_states, vocab_weights, None)
        target = input_ids.to(torch.int64).flatten()
        stats = linear_logprob(head.hidden, head.weight, target, temperature=temperature, chunk_rows=self.chunk_size)
        dtype, shape = hidden_states.dtype, input_ids.shape
        return stats.logprob.to(dtype).reshape(shape), stats.entropy.to(dtype).reshape(shape)


def clipped(log_ratio: Tensor, advantage: Tensor, config: Any) -> Tensor:
    """verl's vanilla: clip_ratio, clip_ratio_low, clip_ratio_high, and clip_ratio_c for the dual clip (3)."""
    low, high = _clip(config)
    dual = config.get("clip_ratio_c", 3.0)
    if not dual > 1:
        raise ValueError(f"clip_ratio_c is the dual clip's bound and must be above 1, got {dual}")
    return losses.clipped(log_ratio.clamp(-20, 20), advantage, low=low, high=high, dual_clip=dual)


def cispo(log_ratio: Tensor, advantage: Tensor, config: Any) -> Tensor:
    """verl's cispo: MiniMax's with a floor, the ratio held between 1 - clip_ratio_low and 1 + clip_ratio_high."""
    low, high = _clip(config)
    log_ratio = log_ratio.clamp(-20, 20)
    return -log_ratio.exp().clamp(1 - low, 1 + high).detach() * advantage * log_ratio


def sapo(log_ratio: Tensor, advantage: Tensor, config: Any) -> Tensor:
    """Soft adaptive gate with tau_pos (1) and tau_neg (1.05)."""
    positive, negative = config.get("tau_pos", 1.0), config.get("tau_neg", 1.05)
    return losses.sapo(
        log_ratio.clamp(-20, 20), advantage, temperature_positive=positive, temperature_negative=negative
    )


def reinforce(log_ratio: Tensor, advantage: Tensor, config: Any) -> Tensor:
    """Plain policy gradient; without an importance weight, so config is not read."""
    return losses.reinforce(log_ratio, advantage)


def _clip(config: Any) -> tuple[float, float]:
    """clip_ratio_low and clip_ratio_high, each clip_ratio where it is None."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


SURROGATES: dict[str, Surrogate] = {
    "fastrl_clipped": clipped,
    "fastrl_cispo": cispo,
    "fastrl_sapo": sapo,
    "fastrl_reinforce": reinforce,
}


def policy_loss(surrogate: Surrogate, aggregate: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A function with the signature of verl's policy losses.

    Args:
        surrogate: loss per token.
        aggregate: verl's `core_algos.agg_loss`: averaging over the global batch is verl's, which knows its numbers.

    Returns:
        `(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)` ->
        (loss, metrics), all tensors [B, T].
    """

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if config is None:
            raise ValueError("a policy loss needs the actor's config: it has the clip and the size of the batch")
        # A sampler may leave NaN where there is no token; nothing of it reaches the loss, the gradient or the metric.
        log_ratio = (log_prob - old_log_prob).where(response_mask.bool(), 0.0)
        per_token = surrogate(log_ratio, advantages, config)
        if rollout_is_weights is not None:
            per_token = per_token * rollout_is_weights
        total = aggregate(
            loss_mat=per_token, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        kl = (-log_ratio.detach().clamp(-20, 20) * response_mask).sum() / response_mask.sum().clamp(min=1)
        return total, {"actor/ppo_kl": kl.item()}

    return loss


def register() -> list[str]:
    """Register every surrogate with verl, which must be installed.

    Returns:
        Their names, for `actor_rollout_ref.actor.policy_loss.loss_mode`.

    Raises:
        ImportError: verl is not installed.
    """
    try:
        host = import_module("verl.trainer.ppo.core_algos")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "verl":
            raise
        raise ImportError(f"register() needs verl, and {error.name} is not here: pip install verl") from None
    for name, surrogate in SURROGATES.items():
        host.register_policy_loss(name)(policy_loss(surrogate, host.agg_loss))
    return list(SURROGATES)
