"""What a round of completions looked like, with numbers a reader can check."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastrl.rewards.score import Scores
from fastrl.train.collect import Experience
from fastrl.train.experience_metrics import experience_metrics
from fastrl.train.prompts import Prompt
from fastrl.types import FinishReason, Rollout

NAN = float("nan")


def experience(
    reward: list[float], group: list[int], lengths: list[int], finish: list[FinishReason], *, n_drawn: int
) -> Experience:
    return Experience(
        prompts=[Prompt((1,), "?", {})] * len(reward),
        rollouts=[Rollout((1,), (0,) * n, (0.0,) * n, why, 0) for n, why in zip(lengths, finish, strict=True)],
        completions=[""] * len(reward),
        group=torch.tensor(group, dtype=torch.int64),
        reward=torch.tensor(reward),
        scores=Scores((), (), {}, {"rewards/judge/mean": 0.5}, {}),
        seconds={"rollout": 6.0, "reward": 3.0},
        n_drawn=n_drawn,
    )


ROUND = experience(
    [1.0, 0.0, 0.5, 0.5, NAN, 2.0],
    [0, 0, 1, 1, 2, 2],
    [3, 5, 8, 8, 1, 5],
    ["stop", "stop", "length", "length", "error", "stop"],
    n_drawn=4,
)


def test_rewards_groups_and_lengths_of_a_round() -> None:
    metrics = experience_metrics(ROUND, updates=1)
    assert metrics["reward"] == pytest.approx(4 / 5)
    assert metrics["reward_std"] == pytest.approx(torch.tensor([1.0, 0.0, 0.5, 0.5, 2.0]).std().item())
    assert metrics["frac_reward_zero_std"] == pytest.approx(3 / 5)  # group 1, and what is left of group 2
    assert metrics["sampling/error_rate"] == pytest.approx(1 / 6)
    assert metrics["completions/mean_length"] == 5.0
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (1.0, 8.0)
    assert metrics["completions/clipped_ratio"] == pytest.approx(2 / 6)
    assert metrics["completions/mean_terminated_length"] == pytest.approx(13 / 3)
    assert (metrics["completions/min_terminated_length"], metrics["completions/max_terminated_length"]) == (3.0, 5.0)
    assert metrics["dynamic_sampling/waste"] == 1 / 4
    assert metrics["rewards/judge/mean"] == 0.5


def test_duplicates_are_counted_inside_groups_without_each_groups_first() -> None:
    # completions of these lengths are all zeros, so length tells them apart: group 0 has one copy, group 1 two
    found = experience([0.0] * 6, [0, 0, 0, 1, 1, 1], [3, 5, 3, 3, 3, 3], ["stop"] * 6, n_drawn=2)
    assert experience_metrics(found, updates=1)["completions/duplicates"] == 3 / 4
    alone = experience([0.0] * 2, [0, 1], [3, 3], ["stop"] * 2, n_drawn=2)
    assert "completions/duplicates" not in experience_metrics(alone, updates=1)


def test_the_seconds_of_a_round_are_shared_by_its_updates() -> None:
    metrics = experience_metrics(ROUND, updates=3)
    assert (metrics["time/rollout"], metrics["time/reward"]) == (2.0, 1.0)


def test_what_is_not_there_is_absent_rather_than_zero() -> None:
    unjudged = replace(ROUND, reward=torch.full((6,), NAN))
    assert not {"reward", "reward_std", "frac_reward_zero_std"} & experience_metrics(unjudged, updates=1).keys()
    nothing = experience([], [], [], [], n_drawn=2)
    assert experience_metrics(nothing, updates=1) == {
        "rewards/judge/mean": 0.5,
        "dynamic_sampling/waste": 1.0,
        "time/rollout": 6.0,
        "time/reward": 3.0,
    }
    truncated = replace(ROUND, rollouts=[ROUND.rollouts[2]] * 6)
    assert "completions/mean_terminated_length" not in experience_metrics(truncated, updates=1)
