"""From judged rollouts to the constants of PPO's updates: rewards per token, values, advantages; then mini-batches.

    r[t] = -kl_coef kl[t] + (score at the completion's last token),    A, R = GAE(r, V),    A whitened over the round

Everything is measured once, under the policy and the critic that the round was sampled with, kept per sequence, and
packed anew for every mini-batch. How the round was packed therefore changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.data.pack import TokenSequence, unpack_columns
from fastrl.losses.advantage import token_reward, whiten
from fastrl.losses.kl import Estimator
from fastrl.ops.gae import gae
from fastrl.train.config import PPOConfig
from fastrl.train.order import epoch_order
from fastrl.train.running_moments import RunningMoments
from fastrl.train.sequences import rollout_sequences
from fastrl.train.shares import of_every_batch, packed_for_ranks
from fastrl.types import Rollout, TokenBatch

PerToken = Callable[[TokenBatch], Tensor]


@dataclass(frozen=True, slots=True)
class Measures:
    """What the models say about the tokens of a packed batch, each [T] f32, without gradient.

    Attributes:
        logprob: under the policy that sampled, at its temperature.
        ref_logprob: under the reference; None without a KL.
        value: the critic's, of the state in which `target[t]` is chosen.
    """

    logprob: PerToken
    ref_logprob: PerToken | None
    value: PerToken


@dataclass(frozen=True, slots=True)
class Round:
    """What the updates of a round learn from.

    Attributes:
        sequences: one per judged completion; weight 1 on trained tokens, and every column the losses read.
        metrics: of the round, under TRL's names.
        kl: mean KL to the reference per token, nats; None without a reference.
    """

    sequences: list[TokenSequence]
    metrics: dict[str, float]
    kl: float | None


def shaped_scores(config: PPOConfig, reward: Tensor, rollouts: Sequence[Rollout], moments: RunningMoments) -> Tensor:
    """The scores that go on the last tokens: standardised, clipped, less the penalty of truncation, as configured.

        s = clip((r - mean) / std, +-reward_clip) - missing_eos_penalty (if the completion was cut off)

    Args:
        reward: [S] of judged completions.
        rollouts: [S] they belong to; one that ran into the length limit is truncated.
        moments: of all scores so far; takes these in first, when normalize_rewards is on.

    Returns:
        [S] in units of reward, after normalisation.

    Source: Zheng 2023, arXiv:2307.04964, sec. 5.2.1 (normalisation, then clip); TRL `missing_eos_penalty`.
    """
    score = reward
    if config.normalize_rewards:
        moments.update(reward)
        score = moments.standardized(reward)
    if config.reward_clip is not None:
        score = score.clamp(-config.reward_clip, config.reward_clip)
    if config.missing_eos_penalty is None:
        return score
    is_truncated = torch.tensor([rollout.finish_reason == "length" for rollout in rollouts], dtype=torch.bool)
    return torch.where(is_truncated, score - config.missing_eos_penalty, score)


@torch.no_grad()
def measured_round(
    config: PPOConfig,
    rollouts: Sequence[Rollout],
    score: Tensor,
    measures: Measures,
    *,
    estimator: Estimator,
    kl_coef: float,
    device: torch.device,
) -> Round:
    """Measure a round once and turn its scores into advantages and returns per token.

    Args:
        rollouts: [S] judged completions; at least one.
        score: [S] what `shaped_scores` made of their rewards.
        estimator: of the KL to the reference.
        kl_coef: reward per nat, of this moment.
        device: of the models.
    """
    plain = rollout_sequences(rollouts, weight=[1.0] * len(rollouts), advantage=[0.0] * len(rollouts))
    batches = packed_for_ranks(plain, token_budget=config.packing.token_budget, device=device)
    trained = torch.cat([batch.weight != 0 for batch in batches])
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed_score = score.to(device)[torch.cat([batch.sequence for batch in batches])]

    logprob, value = (_of_all(batches, trained, function) for function in (measures.logprob, measures.value))
    columns = {"old_logprob": logprob, "old_value": value}
    kl = torch.zeros_like(logprob)
    if measures.ref_logprob is not None:
        columns["ref_logprob"] = _of_all(batches, trained, measures.ref_logprob)
        kl = torch.where(trained, estimator(logprob, columns["ref_logprob"]), 0.0)
    reward = token_reward(packed_score, kl, borders, trained, coef=kl_coef)
    if config.whiten_rewards:
        mean = reward.sum(dtype=torch.float64) / trained.sum()
        reward = torch.where(trained, whiten(reward, trained) + mean.float(), 0.0)
    advantage, returns = gae(reward, value, borders, trained, gamma=config.gamma, lam=config.lam)
    columns |= {"advantage": whiten(advantage, trained), "returns": returns}

    sizes = [len(batch.weight) for batch in batches]
    per_sequence = {name: unpack_columns(column.cpu().split(sizes), batches) for name, column in columns.items()}
    sequences = [
        replace(sequence, **{name: column[index] for name, column in per_sequence.items()})
        for index, sequence in enumerate(plain)
    ]
    metrics, kl_per_token = _metrics(logprob, kl, value, returns, trained, score, kl_coef)
    if measures.ref_logprob is None:
        return Round(sequences, {name: x for name, x in metrics.items() if "kl" not in name}, None)
    return Round(sequences, metrics, kl_per_token)


def mini_batches(
    config: PPOConfig, sequences: Sequence[TokenSequence], *, ordinal: int, epoch: int
) -> list[list[TokenSequence]]:
    """The sequences of each optimizer step of one pass over a round, every trained token weighing 1 / (tokens there).

    The order is a permutation fixed by the seed, the round and the pass. Averaging over the tokens of the mini-batch,
    not of the round, is what TRL and OpenRLHF do.

    Args:
        ordinal: prompts drawn before the round.
        epoch: which pass.

    Returns:
        `num_mini_batches` lists; the last ones are empty when there are fewer sequences.
    """
    order = epoch_order(len(sequences), config.seed, ordinal * config.num_ppo_epochs + epoch)
    parts = torch.tensor(order, dtype=torch.int64).tensor_split(config.num_mini_batches)
    return [_weighed([sequences[index] for index in part.tolist()]) for part in parts]


def _weighed(sequences: list[TokenSequence]) -> list[TokenSequence]:
    weights = [torch.as_tensor(sequence.weight) for sequence in sequences]
    count = sum(float(weight.sum()) for weight in weights)
    return [
        replace(sequence, weight=weight / count) for sequence, weight in zip(sequences, weights, strict=True) if count
    ]


def _of_all(batches: Sequence[TokenBatch], trained: Tensor, function: PerToken) -> Tensor:
    """[T] of all batches one after another, 0 where not trained; every rank measures its own, and has all."""
    (found,) = of_every_batch(batches, lambda batch: (function(batch),), columns=1, what="the measures of the round")
    return torch.where(trained, torch.cat(found), 0.0)


def _metrics(
    logprob: Tensor, kl: Tensor, value: Tensor, returns: Tensor, trained: Tensor, score: Tensor, kl_coef: float
) -> tuple[dict[str, float], float]:
    """Sums per completion, averaged over completions, as TRL logs them; and the mean KL of a token. One host sync."""
    n = len(score)
    target = returns[trained].double()
    error = (target - value[trained].double()).var(correction=0)
    numbers = [kl.sum(dtype=torch.float64), -logprob.sum(dtype=torch.float64), score.double().mean().to(kl.device)]
    numbers += [trained.sum().double(), value.sum(dtype=torch.float64), error, target.var(correction=0)]
    total_kl, entropy, mean_score, tokens, total_value, residual, spread = torch.stack(numbers).tolist()
    metrics = {
        "objective/kl": total_kl / n,
        "objective/entropy": entropy / n,
        "objective/non_score_reward": -kl_coef * total_kl / n,
        "objective/rlhf_reward": mean_score - kl_coef * total_kl / n,
        "objective/scores": mean_score,
        "kl_coef": kl_coef,
        "val/mean": total_value / tokens,
    }
    if spread > 0:
        metrics["val/explained_variance"] = 1 - residual / spread
    return metrics, total_kl / tokens
