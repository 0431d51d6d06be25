"""From scored completions to packed batches that hold every constant of the loss.

Weights and advantages are those of the whole optimizer step, so what is cut, dropped or reordered afterwards
changes nothing. Sequences that cannot move the policy never reach the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.algorithms.policy_gradient import PolicyGradient, has_signal, token_advantage
from fastrl.data.pack import TokenSequence
from fastrl.losses.entropy import entropy_keep
from fastrl.losses.weighting import without
from fastrl.train.config import KernelsBlock
from fastrl.train.logprob import trained_logprob
from fastrl.train.lora import adapter_off
from fastrl.train.model import model_head
from fastrl.train.sequences import rollout_sequences, trained_length
from fastrl.train.shares import of_every_batch, packed_for_ranks
from fastrl.types import Head, Rollout, TokenBatch


@dataclass(frozen=True, slots=True)
class StepSequences:
    """The completions of one optimizer step that have a gradient, laid out for packing.

    Attributes:
        sequences: those with a weight and a signal.
        n_sequences: completions of the step, the dropped ones included.
        n_tokens: tokens of all completions and their prompts, the dropped ones included.
    """

    sequences: list[TokenSequence]
    n_sequences: int
    n_tokens: int


def cut_into_steps(
    algorithm: PolicyGradient,
    rollouts: Sequence[Rollout],
    advantage: Tensor,
    group: Tensor,
    *,
    is_judged: Tensor,
    is_kept: Tensor,
    keep_denominator: bool,
    steps: int,
    credit: Sequence[Sequence[float]] | None = None,
) -> list[StepSequences]:
    """Cut a round into optimizer steps of equal size, weigh each step's completions, drop those without gradient.

    Args:
        algorithm: weighting, kl and entropy bonus are read.
        rollouts: [S] of the round, group by group.
        advantage: [S] in units of reward.
        group: [S] int64.
        is_judged: [S] bool; False (no verdict, failed engine) leaves loss and denominator.
        is_kept: [S] bool; False (truncated, when those are masked) leaves the loss.
        keep_denominator: completions masked by `is_kept` still count in the denominator.
        credit: [S][completion tokens] what each token's advantage gains beside its completion's; None is nothing.
        steps: how many; a round with fewer completions makes fewer steps.
    """
    cut = []
    for part in torch.arange(len(rollouts)).tensor_split(min(steps, max(1, len(rollouts)))):
        cut.append(
            step_sequences(
                algorithm,
                [rollouts[i] for i in part.tolist()],
                advantage[part],
                group[part],
                is_judged=is_judged[part],
                is_kept=is_kept[part],
                keep_denominator=keep_denominator,
                credit=None if credit is None else [credit[i] for i in part.tolist()],
            )
        )
    return cut


def step_sequences(
    algorithm: PolicyGradient,
    rollouts: Sequence[Rollout],
    advantage: Tensor,
    group: Tensor,
    *,
    is_judged: Tensor,
    is_kept: Tensor,
    keep_denominator: bool,
    credit: Sequence[Sequence[float]] | None = None,
) -> StepSequences:
    """Weigh the completions of one optimizer step and drop those without gradient; the normaliser keeps them.

    Arguments as `cut_into_steps`, for one step.
    """
    length = torch.tensor([trained_length(rollout) for rollout in rollouts], dtype=torch.int64)
    length = torch.where(is_judged, length, 0)
    weight = without(algorithm.weighting, length, group, is_kept, keep_denominator=keep_denominator)
    moves = torch.ones_like(is_kept) if needs_every_token(algorithm) else has_signal(algorithm, advantage)
    if credit is not None:
        moves = moves | torch.tensor([any(each) for each in credit], dtype=torch.bool)
    chosen = (weight != 0) & moves
    sequences = rollout_sequences(
        list(compress(rollouts, chosen.tolist())),
        weight=weight[chosen].tolist(),
        advantage=advantage[chosen].tolist(),
        credit=None if credit is None else list(compress(credit, chosen.tolist())),
    )
    n_tokens = sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts)
    return StepSequences(sequences, len(rollouts), n_tokens)


def needs_every_token(algorithm: PolicyGradient) -> bool:
    """Whether advantages depend on tokens of the whole step: a KL in the reward, whitening, an entropy threshold."""
    kl_in_reward = algorithm.kl is not None and algorithm.kl.placement == "reward"
    return kl_in_reward or algorithm.whiten or algorithm.entropy_quantile < 1


@torch.no_grad()
def trained_stats(
    model: PreTrainedModel, head: Head, batch: TokenBatch, kernels: KernelsBlock
) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy [T] of the trained positions, 0 elsewhere: the waist without gradient."""
    return trained_logprob(model, head, batch, kernels)


def prepare(
    algorithm: PolicyGradient,
    step: StepSequences,
    *,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    temperature: float,
    token_budget: int,
    kernels: KernelsBlock,
    needs_old: bool,
) -> list[TokenBatch]:
    """Pack one optimizer step and fill in the log-probabilities its loss compares with.

    Args:
        reference: the frozen reference, or the policy when that has an adapter (it is turned off here); needed when
            the algorithm has a KL.
        temperature: divides the logits.
        token_budget: most positions of a batch.
        kernels: how the passes over the head run.
        needs_old: more than one update follows, so l_old must be kept; otherwise l_old = stop(l) costs nothing.

    Returns:
        Batches on the model's device; [] when no completion of the step has a gradient.
    """
    device = next(model.parameters()).device
    batches = packed_for_ranks(step.sequences, token_budget=token_budget, device=device)
    needs_entropy = algorithm.entropy_quantile < 1
    kl_in_reward = algorithm.kl is not None and algorithm.kl.placement == "reward"
    if algorithm.kl is not None:
        assert reference is not None, "an algorithm with a KL needs the reference model"
        head = model_head(reference, temperature=temperature)
        with adapter_off(reference):
            ref = _stats_of_step(reference, head, batches, kernels, "the reference's log-probabilities")[0]
        batches = [replace(batch, ref_logprob=logprob) for batch, logprob in zip(batches, ref, strict=True)]
    old: list[Tensor] = []
    entropy: list[Tensor] = []
    if needs_old or needs_entropy or kl_in_reward:
        head = model_head(model, temperature=temperature)
        old, entropy = _stats_of_step(model, head, batches, kernels, "the policy's log-probabilities")
    if kl_in_reward or algorithm.whiten:
        batches = _with_token_advantage(algorithm, batches, old)
    if needs_entropy:
        batches = _with_kept_entropy(algorithm, batches, entropy)
    if needs_old:
        batches = [replace(batch, old_logprob=logprob) for batch, logprob in zip(batches, old, strict=True)]
    return batches


def _stats_of_step(
    model: PreTrainedModel, head: Head, batches: Sequence[TokenBatch], kernels: KernelsBlock, what: str
) -> list[list[Tensor]]:
    """Log-probabilities and entropies of all batches of a step; every rank measures its own, and has all."""
    return of_every_batch(batches, lambda batch: trained_stats(model, head, batch, kernels), columns=2, what=what)


def _with_token_advantage(
    algorithm: PolicyGradient, batches: list[TokenBatch], logprob: list[Tensor]
) -> list[TokenBatch]:
    """Spread advantages over tokens with the KL of the reward and whitening, over the whole step at once."""
    if not batches:
        return []
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    trained = torch.cat([batch.weight != 0 for batch in batches])
    # One advantage per sequence: that of its last token, which is always the completion's.
    advantage = torch.cat([_required(batch.advantage)[batch.cu_seqlens[1:].long() - 1] for batch in batches])
    kl = None
    if algorithm.kl is not None and algorithm.kl.placement == "reward":
        ref = torch.cat([_required(batch.ref_logprob) for batch in batches])
        kl = torch.where(trained, algorithm.kl.estimator(torch.cat(logprob), ref), 0.0)
    spread = token_advantage(algorithm, advantage, borders, trained, kl=kl)
    parts = spread.split([len(batch.weight) for batch in batches])
    return [replace(batch, advantage=part) for batch, part in zip(batches, parts, strict=True)]


def _with_kept_entropy(algorithm: PolicyGradient, batches: list[TokenBatch], entropy: list[Tensor]) -> list[TokenBatch]:
    """Take the advantage from the step's tokens of low entropy; their KL and the normaliser stay."""
    if not batches:
        return []
    trained = torch.cat([batch.weight != 0 for batch in batches])
    kept = entropy_keep(torch.cat(entropy), trained, algorithm.entropy_quantile)
    parts = kept.split([len(batch.weight) for batch in batches])
    return [
        replace(batch, advantage=torch.where(part, _required(batch.advantage), 0.0))
        for batch, part in zip(batches, parts, strict=True)
    ]


def _required(column: Tensor | None) -> Tensor:
    assert column is not None
    return column
