"""The stream of segments, with the built-in engine in this process and weights that change between rounds."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastrl.rewards.protocol import Reward
from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Sampling
from fastrl.train.ahead import Source
from fastrl.train.collect import Experience, Sampler
from fastrl.train.config import GRPOConfig, OverlongBlock
from fastrl.train.prompts import Prompt
from fastrl.train.snapshot import Progress
from fastrl.train.staleness import token_versions
from fastrl.train.stream import Stream
from fastrl.types import Rollout
from tests.rollout.contract import naive_logprob, some_prompts
from tests.rollout.tiny import qwen3, tiny_tokenizer

POOL = [Prompt(tuple(ids), f"question {i}", {}) for i, ids in enumerate(some_prompts((3, 9, 4, 12, 5, 7, 6)))]
SAMPLING = Sampling(max_completion_length=12, repetition_penalty=1.1)


class Slow(BuiltinEngine):
    """Takes a moment for a segment, so that weights arrive in the middle of completions; counts its calls."""

    calls = 0

    def generate(self, *args: Any, **kwargs: Any) -> list[Rollout]:
        self.calls += 1
        time.sleep(0.02)
        return super().generate(*args, **kwargs)


def distinct(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [len(set(ids)) / 12 for ids in completion_ids]


def source_of(policy: PreTrainedModel, engine: BuiltinEngine, **changes: Any) -> Source:
    config = GRPOConfig(model_name_or_path="", output_dir="", train_dataset="", reward_funcs=("distinct",))
    sampler = Sampler(
        engine=engine,
        decode=lambda ids: " ".join(map(str, ids)),
        rewards=[Reward(distinct)],
        sampling=SAMPLING,
        num_generations=3,
        seed=5,
        overlong=OverlongBlock(),
    )
    found = Source(config, policy, sampler, POOL, groups=2, max_rounds=0, updates=1, total_steps=100)
    return replace(found, **changes)


@contextmanager
def opened(source: Source, **options: Any) -> Iterator[Stream]:
    stream = Stream(source, **({"depth": 2, "segment_tokens": 3} | options))
    try:
        yield stream
    finally:
        stream.close()


def move(policy: PreTrainedModel, step: int) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel()).view_as(parameter).float() + step))


def made() -> tuple[PreTrainedModel, Slow]:
    policy = qwen3()
    policy.generation_config.eos_token_id = [1, 2, 3]  # completions of different lengths
    return policy, Slow(copy.deepcopy(policy), tiny_tokenizer())


def test_each_token_has_the_logprob_of_the_weights_it_is_stamped_with() -> None:
    policy, engine = made()
    weights: dict[int, PreTrainedModel] = {}
    rollouts: list[Rollout] = []
    with opened(source_of(policy, engine)) as stream:
        for step in range(8):
            weights[step] = copy.deepcopy(policy).eval()
            experience, _ = stream.take(Progress(step=step))
            rollouts += experience.rollouts
            assert all(0 <= step - version <= 2 for each in experience.rollouts for version in token_versions(each))
            move(policy, step)
    assert any(rollout.token_version is not None for rollout in rollouts)
    for rollout in rollouts:
        ids, n = rollout.prompt_ids + rollout.completion_ids, len(rollout.prompt_ids)
        for t, (token, version) in enumerate(zip(rollout.completion_ids, token_versions(rollout), strict=True)):
            with torch.no_grad():
                logits = weights[version](torch.tensor([ids[: n + t]])).logits[0, -1]
            want = naive_logprob(logits, set(ids[: n + t]), SAMPLING)[token]
            assert rollout.logprob[t] == pytest.approx(float(want), abs=1e-4)


def test_a_stream_that_goes_on_from_a_checkpoint_loses_no_completion_and_hands_over_none_twice() -> None:
    policy, engine = made()
    with opened(source_of(policy, engine)) as stream:
        before = [stream.take(Progress(step=step))[0] for step in range(3)]
        state = {name: tensor.clone() for name, tensor in stream.state_dict().items()}
        begun = {
            (group.ordinal, i): rollout.completion_ids
            for group in stream._groups
            for i, rollout in enumerate(group.rollouts)
            if rollout is not None
        }
    policy, engine = made()
    with opened(source_of(policy, engine)) as stream:
        stream.load_state_dict(state)
        after = [stream.take(Progress(step=step, ordinal=int(state["cursor"])))[0] for step in range(3, 8)]
    ordinals = [ordinal for each in before + after for ordinal in dict.fromkeys(each.group.tolist())]
    assert len(set(ordinals)) == len(ordinals) == 16
    assert set(ordinals) >= set(range(14))  # what is missing is still being sampled
    found = places(after)
    assert {place for place in begun if place[0] < 14} <= found.keys()
    for place, ids in begun.items():
        if place in found:
            assert found[place].completion_ids[: len(ids)] == ids
    assert begun


def places(experiences: list[Experience]) -> dict[tuple[int, int], Rollout]:
    """(ordinal, place in the group) -> rollout."""
    found: dict[tuple[int, int], Rollout] = {}
    for experience in experiences:
        for ordinal, rollout in zip(experience.group.tolist(), experience.rollouts, strict=True):
            found[ordinal, sum(key[0] == ordinal for key in found)] = rollout
    return found


def test_groups_without_signal_are_replaced_while_others_go_on() -> None:
    policy, engine = made()
    source = source_of(policy, engine, max_rounds=3)
    odd = Reward(
        lambda prompts, completion_ids, **_: [
            float(i) if int(prompt[-1]) % 2 else 0.0 for i, prompt in enumerate(prompts)
        ],
        name="odd",
    )
    source = replace(source, sampler=replace(source.sampler, rewards=[odd]))
    with opened(source) as stream:
        rounds = [stream.take(Progress(step=step))[0] for step in range(4)]
    for experience in rounds:
        assert all(int(prompt.prompt[-1]) % 2 for prompt in experience.prompts)
        assert len(experience.group.unique()) == 2
    assert sum(experience.n_drawn for experience in rounds) > 8


def test_nothing_is_sampled_or_judged_while_the_stream_is_paused() -> None:
    policy, engine = made()
    with opened(source_of(policy, engine), depth=3) as stream:
        stream.take(Progress())
        with stream.paused():
            calls = engine.calls
            engine.load_weights(qwen3(), 99)  # an evaluation would
            time.sleep(0.2)
            assert engine.calls == calls
        for step in (1, 2, 3):
            experience, _ = stream.take(Progress(step=step))
            assert all(version <= step for each in experience.rollouts for version in token_versions(each))
        assert engine.calls > calls


def test_what_fails_in_the_stream_is_raised_where_it_is_taken() -> None:
    policy, engine = made()
    threads = threading.active_count()

    def refuse(*_: Any, **__: Any) -> list[Rollout]:
        raise RuntimeError("no memory left")

    engine.generate = refuse  # type: ignore[method-assign]
    with opened(source_of(policy, engine)) as stream, pytest.raises(RuntimeError, match="no memory left"):
        stream.take(Progress())
    assert threading.active_count() == threads


def test_the_end_of_the_run_draws_no_prompt_that_nothing_will_learn_from() -> None:
    policy, engine = made()
    with opened(source_of(policy, engine, total_steps=3)) as stream:
        for step in range(3):
            _, ordinal = stream.take(Progress(step=step))
    assert ordinal == 6
