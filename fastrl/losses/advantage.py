"""How good a completion was, compared with what: `(reward [S], group [S]) -> [S]`; per token with KL in the reward.

Rewards of rollouts that could not be judged are NaN: they leave every mean and deviation and get advantage 0.
Groups are ragged and in any order. Equal rewards, and a group of one, give exactly 0 under every baseline.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.ops.gae import gae
from fastrl.ops.group_advantage import Baseline, Scale, group_advantage

Advantage = Callable[[Tensor, Tensor], Tensor]


def group_normalized(reward: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """GRPO: (r - mean of the group) / (deviation of the group + eps).

    Source: Shao 2024, arXiv:2402.03300, sec. 4.1.2; ddof and eps are TRL's.
    """
    return group_advantage(reward, group, baseline=Baseline.MEAN, scale=Scale.GROUP, ddof=ddof, eps=eps)


def group_centered(reward: Tensor, group: Tensor) -> Tensor:
    """Dr. GRPO: r - mean of the group, so that easy and hard prompts are not blown up.

    Source: Liu 2025, arXiv:2503.20783, sec. 3.
    """
    return group_advantage(reward, group, baseline=Baseline.MEAN, scale=Scale.NONE)


def leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """RLOO: r - mean of the group's other rewards = n / (n - 1) (r - mean).

    Source: Ahmadian 2024, arXiv:2402.14740, sec. 3.
    """
    return group_advantage(reward, group, baseline=Baseline.LEAVE_ONE_OUT, scale=Scale.NONE)


def batch_normalized(reward: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """(r - mean of the group) / (deviation of all rewards + eps): TRL's `scale_rewards="batch"`.

    Source: Liu 2025, arXiv:2508.08221 (group mean, batch deviation); Hu 2025, arXiv:2501.03262 (the baseline variant).
    """
    return group_advantage(reward, group, baseline=Baseline.MEAN, scale=Scale.BATCH, ddof=ddof, eps=eps)


def raw(reward: Tensor, group: Tensor) -> Tensor:
    """The reward itself, 0 where it could not be judged: for a critic, or for whitening over tokens."""
    return group_advantage(reward, group, baseline=Baseline.NONE, scale=Scale.NONE)


def gpg(reward: Tensor, group: Tensor) -> Tensor:
    """GPG: alpha (r - mean of the group), alpha = B / (B - M); M of the B judged rollouts are in groups without signal.

    alpha makes up for the share of the batch that carries no gradient.

    Source: Chu 2025, arXiv:2504.02546 (F_norm = 1, alpha = B / (B - M)).
    """
    centered = group_centered(reward, group)
    with_signal = _group_any(centered != 0, group) & reward.isfinite()
    alpha = reward.isfinite().sum().double() / with_signal.sum().clamp(min=1)
    return centered * alpha.to(reward.dtype)


def multi_objective(reward: Tensor, group: Tensor, weights: Tensor, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """GDPO: every reward normalised inside the group on its own, weighed, summed, then normalised over the batch.

    Args:
        reward: [S, R] one column per reward; NaN where a reward does not apply, which then counts as 0 in the sum.
        group: [S] int64.
        weights: [R] how much each normalised reward counts.
        ddof, eps: as in `group_normalized`, for both normalisations.

    Returns:
        [S] advantage; 0 for a rollout that no reward judged.

    Source: Liu 2026, arXiv:2601.05242, sec. 3; TRL `multi_objective_aggregation="normalize_then_sum"`.
    """
    if reward.dim() != 2 or weights.shape != reward.shape[1:]:
        raise ValueError(
            f"multi_objective needs reward [S, R] and weights [R], got {tuple(reward.shape)} and {tuple(weights.shape)}"
        )
    columns = [group_normalized(column, group, ddof=ddof, eps=eps) for column in reward.unbind(1)]
    summed = torch.stack(columns, 1) @ weights.to(reward.dtype)
    judged = reward.isfinite().any(1)
    summed = torch.where(judged, summed, torch.nan)
    return group_normalized(summed, torch.zeros_like(group), ddof=ddof, eps=eps)


def clamped(reward: Tensor, group: Tensor, *, advantage: Advantage, limit: float) -> Tensor:
    """Another advantage held in +-limit: OpenRLHF's `reward.clip_range`, which it applies after its baseline."""
    return advantage(reward, group).clamp(-limit, limit)


def whiten(advantage: Tensor, trained: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit variance over all trained tokens of the optimizer step.

        (A - mean) / sqrt(var + eps),    var with n - 1

    Args:
        advantage: [T] of the whole step, all ranks; constant.
        trained: [T] bool.
        eps: added to the variance.

    Returns:
        [T]; 0 where not trained and where all trained advantages are equal. Mean and variance are taken in f64.

    Source: TRL and verl `masked_whiten`.
    """
    a = torch.where(trained, advantage, 0.0).double()
    count = trained.sum()
    centered = torch.where(trained, a - a.sum() / count.clamp(min=1), 0.0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    varies = torch.where(trained, a, -torch.inf).amax() > torch.where(trained, a, torch.inf).amin() if len(a) else False
    return (centered * (variance + eps).rsqrt() * varies).to(advantage.dtype)


def token_reward(score: Tensor, kl: Tensor, cu_seqlens: Tensor, trained: Tensor, *, coef: float) -> Tensor:
    """RLHF's reward per token: a KL penalty at each one, the completion's score at the last one trained.

        r[t] = -coef kl[t] + (score of the sequence if t is its last trained token)

    Args:
        score: [S] reward or advantage of each packed sequence.
        kl: [T] an estimate per token (`kl.k1` under the policy that sampled), nats; constant.
        cu_seqlens: [S + 1] borders of the sequences.
        trained: [T] bool.
        coef: reward per nat.

    Returns:
        [T]; 0 where not trained. A sequence without a trained token loses its score.

    Source: Ziegler 2019, arXiv:1909.08593, eq. 2; Ouyang 2022, arXiv:2203.02155, eq. 2.
    """
    place = torch.arange(len(kl), device=kl.device)
    sequence = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=len(kl))
    last = torch.full_like(score, -1, dtype=torch.int64)
    last = last.scatter_reduce(0, sequence, torch.where(trained, place, -1), "amax")
    at_end = torch.where(place == last[sequence], score[sequence].to(kl.dtype), 0.0)
    return torch.where(trained, at_end - coef * kl, 0.0)


def return_to_go(
    score: Tensor, kl: Tensor, cu_seqlens: Tensor, trained: Tensor, *, coef: float, gamma: float = 1.0
) -> Tensor:
    """REINFORCE++: at each trained token, the discounted sum of what `token_reward` still has to give.

        A[t] = sum over trained u >= t of gamma^(number of trained tokens from t to u) r[u]

    Args as `token_reward`; gamma: discount per trained token. With coef 0 and gamma 1 it is the score everywhere.

    Returns:
        [T]; 0 where not trained.

    Source: Hu 2025, arXiv:2501.03262, sec. 3 (advantage with the KL in the reward).
    """
    reward = token_reward(score, kl, cu_seqlens, trained, coef=coef)
    return gae(reward, torch.zeros_like(reward), cu_seqlens, trained, gamma=gamma, lam=1.0).advantage


def _group_any(flag: Tensor, group: Tensor) -> Tensor:
    """[S] True where any member of the group is."""
    segment = group.unique(return_inverse=True)[1]
    count = torch.zeros_like(segment).index_add(0, segment, flag.long())
    return count[segment] > 0
