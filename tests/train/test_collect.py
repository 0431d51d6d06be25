"""Rounds of experience from an engine that is told what to sample: groups, exclusions, replacement, punishment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fastrl.rewards.protocol import Reward
from fastrl.rollout.engine import Sampling
from fastrl.rollout.seeds import request_seed
from fastrl.train.collect import Sampler, collect, collect_round
from fastrl.train.config import OverlongBlock
from fastrl.train.experience_metrics import experience_metrics
from fastrl.train.order import row_at
from fastrl.train.prompts import Prompt
from fastrl.types import Rollout

POOL = [Prompt((i, 90), f"question {i}", {"answer": str(i)}) for i in range(6)]
NONE = OverlongBlock()


class Scripted:
    """An engine whose completion k of prompt (i, 90) is `script(i, k)` tokens of k; remembers the seeds."""

    def __init__(self, script: Callable[[int, int], int] = lambda i, k: k + 1, *, failing: Sequence[int] = ()) -> None:
        self.script, self.failing = script, failing
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        assert seeds is not None
        self.seeds += seeds
        found = []
        for place, prompt in enumerate(prompts):
            k = place % 4
            ids = (k,) * self.script(prompt[0], k)
            reason: Any = "error" if k in self.failing else "length" if len(ids) == 8 else "stop"
            found.append(Rollout(tuple(prompt), ids, (-1.0,) * len(ids), reason, 0))
        return found

    def load_weights(self, model: nn.Module, version: int) -> None: ...


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def sampler(engine: Scripted, *functions: Callable[..., Any], overlong: OverlongBlock = NONE, seed: int = 5) -> Sampler:
    return Sampler(
        engine=engine,
        decode=lambda ids: "".join(map(str, ids)),
        rewards=[Reward(function) for function in functions or (length_reward,)],
        sampling=Sampling(max_completion_length=8),
        num_generations=4,
        seed=seed,
        overlong=overlong,
    )


def test_a_group_is_one_prompt_with_its_columns_and_a_seed_per_sample() -> None:
    seen: dict[str, Any] = {}

    def judge(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [0.0] * len(prompts)

    engine = Scripted()
    experience = collect(sampler(engine, judge), POOL[2:4], [12, 13])
    assert engine.seeds == [request_seed(5, ordinal, k) for ordinal in (12, 13) for k in range(4)]
    assert experience.group.tolist() == [12] * 4 + [13] * 4
    assert seen["prompts"] == ["question 2"] * 4 + ["question 3"] * 4
    assert seen["answer"] == ["2"] * 4 + ["3"] * 4
    assert seen["completions"] == ["0", "11", "222", "3333"] * 2
    assert experience.seconds.keys() == {"rollout", "reward"}


def test_conversations_are_judged_as_one_assistant_message() -> None:
    prompt = Prompt((1, 90), [{"role": "user", "content": "?"}], {})
    seen: list[Any] = []

    def judge(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    collect(sampler(Scripted(), judge), [prompt], [0])
    assert seen[1] == [{"role": "assistant", "content": "11"}]


def test_a_rollout_that_the_engine_failed_on_is_shown_to_no_reward_and_has_none() -> None:
    seen: list[str] = []

    def judge(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        seen.extend(completions)
        log_extra("note", [f"saw {text}" for text in completions])
        return [1.0] * len(completions)

    experience = collect(sampler(Scripted(failing=[2]), judge), POOL[:1], [0])
    assert seen == ["0", "11", "3333"]
    assert experience.reward.isnan().tolist() == [False, False, True, False]
    assert experience.scores.values == ((1.0, 1.0, None, 1.0),)
    assert experience.scores.total == (1.0, 1.0, None, 1.0)
    assert list(experience.scores.extra["note"]) == ["saw 0", "saw 11", None, "saw 3333"]
    assert experience_metrics(experience, updates=1)["sampling/error_rate"] == 0.25


def test_an_engine_that_failed_on_everything_leaves_nothing_to_judge() -> None:
    experience = collect(sampler(Scripted(failing=range(4))), POOL[:1], [0])
    assert experience.reward.isnan().all()
    assert "reward" not in experience_metrics(experience, updates=1)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, ValueError("this one")])
def test_a_missing_or_broken_verdict_is_never_a_zero(bad: Any) -> None:
    def judge(completions: list[str], **_: Any) -> list[Any]:
        return [1.0, bad, 2.0, 3.0]

    experience = collect(sampler(Scripted(), judge), POOL[:1], [0])
    assert experience.reward.isnan().tolist() == [False, True, False, False]
    metrics = experience_metrics(experience, updates=1)
    assert metrics["reward"] == 2.0
    assert metrics["rewards/judge/mean"] == 2.0
    assert ("judge" in experience.scores.errors) == (bad is not None)


def test_a_reward_that_raises_fails_the_batch_with_its_traceback() -> None:
    def judge(**_: Any) -> list[float]:
        raise KeyError("no such answer")

    experience = collect(sampler(Scripted(), length_reward, judge), POOL[:1], [0])
    assert experience.reward.isnan().all()
    assert experience.scores.errors["judge"].count == 4
    assert "no such answer" in experience.scores.errors["judge"].first


def test_the_soft_overlong_punishment_is_part_of_the_reward_and_of_the_logged_total() -> None:
    """Limit 8, buffer 4: nothing up to 4 tokens, then a quarter per token."""
    engine = Scripted(lambda i, k: (2, 5, 6, 8)[k])
    experience = collect(sampler(engine, overlong=OverlongBlock(buffer=4, penalty=2.0)), POOL[:1], [0])
    assert experience.reward.tolist() == [2.0, 5 - 0.5, 6 - 1.0, 8 - 2.0]
    assert experience.scores.total == (2.0, 4.5, 5.0, 6.0)
    assert experience.scores.values == ((2.0, 5.0, 6.0, 8.0),)


def round_of(engine: Scripted, *, groups: int, max_rounds: int, first_ordinal: int = 0) -> Any:
    return collect_round(sampler(engine), POOL, first_ordinal=first_ordinal, groups=groups, max_rounds=max_rounds)


def prompt_of(ordinal: int) -> int:
    return row_at(ordinal, n=len(POOL), seed=5)


def test_without_dynamic_sampling_groups_are_taken_as_they_are() -> None:
    experience, ordinal = round_of(Scripted(lambda i, k: 1), groups=3, max_rounds=0, first_ordinal=4)
    assert ordinal == 7
    assert experience.group.unique().tolist() == [4, 5, 6]
    assert [prompt.ids[0] for prompt in experience.prompts[::4]] == [prompt_of(i) for i in (4, 5, 6)]
    assert experience_metrics(experience, updates=1)["frac_reward_zero_std"] == 1.0


def test_groups_without_signal_are_replaced_by_the_next_prompts() -> None:
    """Prompts 1, 3 and 5 always give the same reward."""
    engine = Scripted(lambda i, k: 2 if i % 2 else k + 1)
    experience, ordinal = round_of(engine, groups=3, max_rounds=5)
    drawn = [prompt_of(i) for i in range(ordinal)]
    kept = [i for i in drawn if i % 2 == 0]
    assert len(kept) == 3
    assert [prompt.ids[0] for prompt in experience.prompts[::4]] == kept
    assert len(experience.rollouts) == len(experience.completions) == len(experience.scores.total) == 12
    assert experience.n_drawn == len(drawn)
    metrics = experience_metrics(experience, updates=1)
    assert metrics["dynamic_sampling/waste"] == pytest.approx(1 - 3 / len(drawn))
    assert metrics["frac_reward_zero_std"] == 0.0
    assert metrics["rewards/length_reward/mean"] == pytest.approx(
        sum(2.0 if i % 2 else 2.5 for i in drawn) / len(drawn)
    )


def test_rounds_are_bounded_and_what_is_there_is_taken() -> None:
    engine = Scripted(lambda i, k: k + 1 if i == prompt_of(1) else 2)
    experience, ordinal = round_of(engine, groups=2, max_rounds=1)
    assert ordinal == 3  # two groups, then one for the missing one
    assert experience.group.tolist() == [1] * 4
    assert experience_metrics(experience, updates=1)["dynamic_sampling/waste"] == pytest.approx(2 / 3)


def test_a_round_without_any_signal_is_empty_and_has_no_number_that_is_not_one() -> None:
    experience, ordinal = round_of(Scripted(lambda i, k: 2), groups=2, max_rounds=2)
    assert ordinal == 6
    assert experience.rollouts == []
    metrics = experience_metrics(experience, updates=1)
    assert metrics["dynamic_sampling/waste"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_failures_of_all_rounds_are_counted_also_of_groups_that_were_replaced() -> None:
    def judge(completions: list[str], **_: Any) -> list[Any]:
        return [ValueError("first of each group") if s % 4 == 0 else 1.0 for s in range(len(completions))]

    chosen = replace(sampler(Scripted()), rewards=[Reward(judge)])
    experience, ordinal = collect_round(chosen, POOL, first_ordinal=0, groups=2, max_rounds=1)
    assert ordinal == 4
    assert experience.rollouts == []
    assert experience.scores.errors["judge"].count == 4
    assert experience.scores.metrics["rewards/judge/error_rate"] == 0.25


def test_a_group_with_signal_keeps_the_member_without_verdict_for_the_record_only() -> None:
    def judge(completions: list[str], **_: Any) -> list[Any]:
        return [None if s % 4 == 3 else float(s) for s in range(len(completions))]

    chosen = replace(sampler(Scripted()), rewards=[Reward(judge)])
    experience, _ = collect_round(chosen, POOL, first_ordinal=0, groups=1, max_rounds=3)
    assert torch.equal(experience.reward.isnan(), torch.tensor([False, False, False, True]))
