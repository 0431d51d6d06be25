"""What a round of completions looked like, under TRL's names."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.train.collect import Experience
from fastrl.train.episode_credit import episode_metrics
from fastrl.train.sequences import trained_length


def experience_metrics(experience: Experience, *, updates: int) -> dict[str, float]:
    """Describe rewards, lengths and groups of a round.

    `reward_std` is the sample deviation over the round, and `frac_reward_zero_std` the share of completions in groups
    whose rewards are all equal, as TRL logs them. Completions without a verdict count in neither. Lengths count what
    the policy sampled, without what tools said.
    `completions/duplicates` is the share of completions, each group's first left out, that repeat an earlier one of
    their group token for token: 1 when each group says one thing only; absent where groups have one completion.

    Args:
        updates: optimizer steps that the round is learned in; each is charged an equal share of the round's seconds.
    """
    metrics = dict(experience.scores.metrics) | episode_metrics(experience.episodes)
    judged = experience.reward.isfinite()
    if len(judged):
        metrics["sampling/error_rate"] = _mean((~judged).double())
    if bool(judged.any()):
        reward = experience.reward[judged].double()
        metrics |= {
            "reward": _mean(reward),
            "reward_std": float(reward.std()) if len(reward) > 1 else 0.0,
            "frac_reward_zero_std": _mean(_in_equal_group(reward, experience.group[judged]).double()),
        }
    lengths = torch.tensor([trained_length(rollout) for rollout in experience.rollouts], dtype=torch.float64)
    is_stopped = torch.tensor([rollout.finish_reason == "stop" for rollout in experience.rollouts], dtype=torch.bool)
    if len(lengths):
        metrics |= _lengths("completions", "", lengths)
        metrics["completions/clipped_ratio"] = _mean(
            torch.tensor([rollout.finish_reason == "length" for rollout in experience.rollouts]).double()
        )
    if bool(is_stopped.any()):
        metrics |= _lengths("completions", "_terminated", lengths[is_stopped])
    n_groups = len(experience.group.unique())
    if len(lengths) > n_groups:
        said = set(zip(experience.group.tolist(), (each.completion_ids for each in experience.rollouts), strict=True))
        metrics["completions/duplicates"] = (len(lengths) - len(said)) / (len(lengths) - n_groups)
    metrics["dynamic_sampling/waste"] = 1 - n_groups / experience.n_drawn
    return metrics | {f"time/{name}": seconds / updates for name, seconds in experience.seconds.items()}


def _lengths(prefix: str, suffix: str, lengths: Tensor) -> dict[str, float]:
    return {
        f"{prefix}/mean{suffix}_length": _mean(lengths),
        f"{prefix}/min{suffix}_length": float(lengths.min()),
        f"{prefix}/max{suffix}_length": float(lengths.max()),
    }


def _in_equal_group(reward: Tensor, group: Tensor) -> Tensor:
    """[S] bool: every reward of the completion's group is the same."""
    labels, segment = group.unique(return_inverse=True)
    highest = reward.new_full((len(labels),), -torch.inf).scatter_reduce(0, segment, reward, "amax")
    lowest = reward.new_full((len(labels),), torch.inf).scatter_reduce(0, segment, reward, "amin")
    return (highest == lowest)[segment]


def _mean(values: Tensor) -> float:
    return float(values.mean())
