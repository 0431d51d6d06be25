"""Episodes: what is trained is what was sampled, whatever tools say; limits, failures, seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrl.data.observation import observer, opened_prompt
from fastrl.data.tool_calls import turn_parser
from fastrl.rollout.engine import Sampling
from fastrl.rollout.environment import Environment
from fastrl.rollout.episodes import Dialogue, EnvironmentFault, Episode, Limits, Request, Start, play
from fastrl.rollout.seeds import request_seed
from fastrl.types import FinishReason, Rollout
from tests.data.chat_tokenizers import SPECIALS, chat_tokenizer

TOKENIZER = chat_tokenizer()
DIALOGUE = Dialogue(turn_parser(TOKENIZER, []), observer(TOKENIZER), frozenset(TOKENIZER.all_special_ids))
CALL = '<tool_call>{"name": "say", "arguments": {"text": "hi"}}</tool_call><|im_end|>'
WIDE = Limits(context=100_000)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


PROMPT = ids_of("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")


@dataclass
class Scripted:
    """An engine that says `turns[k]` in turn k of every episode, cut at the limit, and remembers what it was asked."""

    turns: Sequence[tuple[int, ...]]
    reason: FinishReason = "stop"
    versions: Sequence[int] = (0,)
    asked: list[list[tuple[int, ...]]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    seeds: list[list[int]] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        turn = len(self.asked)
        said = self.turns[turn]
        ids, n = said[: sampling.max_completion_length], len(said)
        self.asked.append([tuple(prompt) for prompt in prompts])
        self.limits.append(sampling.max_completion_length)
        self.seeds.append(list(seeds or ()))
        version = self.versions[min(turn, len(self.versions) - 1)]
        reason: FinishReason = self.reason if len(ids) == n else "length"
        return [Rollout(tuple(prompt), ids, (-float(turn + 1),) * len(ids), reason, version) for prompt in prompts]

    def load_weights(self, model: nn.Module, version: int) -> None: ...

    def rest(self) -> None: ...


class Here:
    """Environments in this process whose tool `say` answers what the test wants."""

    def __init__(self, reply: Callable[[], str], **answers: Mapping[str, Any] | EnvironmentFault) -> None:
        def say(text: str) -> str:
            return reply()

        self.environment = Environment(None, [say])
        self.answers = answers

    def ask(self, requests: Mapping[int, Request]) -> dict[int, Any]:
        return {seat: self._answer(request) for seat, request in requests.items()}

    def _answer(self, request: Request) -> Any:
        return self.answers.get(next(iter(request))) or self.environment.answer(request)

    def close(self) -> None: ...


def start(seed: int = 0, prompt: tuple[int, ...] = PROMPT) -> Start:
    messages = [{"role": "user", "content": "q"}]
    return Start(prompt, {}, seed, lambda text: opened_prompt(TOKENIZER, messages, text, tools=None))


def played(
    engine: Scripted,
    environments: Here,
    *,
    limits: Limits = WIDE,
    longest: int = 10_000,
    starts: Sequence[Start] = (start(),),
) -> list[Episode]:
    return play(engine, environments, DIALOGUE, starts, Sampling(max_completion_length=longest), limits)


def trained(rollout: Rollout) -> tuple[int, ...]:
    assert rollout.is_sampled is not None
    return tuple(i for i, is_sampled in zip(rollout.completion_ids, rollout.is_sampled, strict=True) if is_sampled)


def test_a_completion_is_turn_observation_turn() -> None:
    turns = [ids_of(CALL), ids_of("done<|im_end|>")]
    engine = Scripted(turns, versions=(4, 5))
    (episode,) = played(engine, Here(lambda: "42"))
    observation = DIALOGUE.observe([{"role": "tool", "name": "say", "content": "42"}], True)
    n = [len(turns[0]), len(observation), len(turns[1])]
    assert episode.rollout == Rollout(
        prompt_ids=PROMPT,
        completion_ids=(*turns[0], *observation, *turns[1]),
        logprob=(-1.0,) * n[0] + (0.0,) * n[1] + (-2.0,) * n[2],
        finish_reason="stop",
        policy_version=4,
        is_sampled=(True,) * n[0] + (False,) * n[1] + (True,) * n[2],
        token_version=(4,) * (n[0] + n[1]) + (5,) * n[2],
    )
    assert engine.asked[1] == [(*PROMPT, *turns[0], *observation)]
    assert episode.turn_ends == (n[0], sum(n))
    assert [message["role"] for message in episode.messages] == ["assistant", "tool", "assistant"]
    assert (episode.n_calls, episode.n_failures, episode.limit) == (1, 0, "")


SAID = st.lists(st.sampled_from(["a", "é", "{", "<|im_start|>", "</tool_call>", "\n", *SPECIALS]), max_size=5)
REPLY = st.text(max_size=12) | st.lists(st.sampled_from([*SPECIALS, "<tool_call>", "\ue000"]), max_size=4).map("".join)


@given(st.lists(SAID, min_size=1, max_size=4), st.lists(REPLY, min_size=4, max_size=4), st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_the_trained_ids_are_the_sampled_ids_whatever_tools_return(
    texts: list[list[str]], replies: list[str], longest: int
) -> None:
    turns = [ids_of("".join(text) + CALL) for text in texts] + [ids_of("end<|im_end|>")]
    engine = Scripted(turns)
    said = iter([*replies, ""])
    (episode,) = played(engine, Here(lambda: next(said)), longest=longest, limits=Limits(100_000, tool_rounds=4))
    rollout = episode.rollout
    sampled = [turn[:limit] for turn, limit in zip(turns, engine.limits, strict=False)]
    assert trained(rollout) == tuple(i for turn in sampled for i in turn)
    assert len(rollout.completion_ids) <= longest
    assert len(rollout.completion_ids) == len(rollout.logprob) == len(rollout.is_sampled or ())
    assert all(
        (value == 0.0) is not is_sampled
        for value, is_sampled in zip(rollout.logprob, rollout.is_sampled or (), strict=True)
    )
    # Each turn was sampled after exactly what the completion holds before it.
    begins = [end - len(turn) for turn, end in zip(sampled, episode.turn_ends, strict=True)]
    assert engine.asked == [[(*PROMPT, *rollout.completion_ids[:begin])] for begin in begins]
    assert rollout.is_sampled is None or rollout.is_sampled[-1]


def test_the_seed_of_a_turn_is_of_its_episode_and_its_number() -> None:
    engine = Scripted([ids_of(CALL), ids_of("x<|im_end|>")])
    played(engine, Here(lambda: "1"), starts=[start(7), start(8)])
    assert engine.seeds == [[request_seed(seed, turn, 0) for seed in (7, 8)] for turn in (0, 1)]


def test_a_broken_call_is_shown_to_the_model_and_counted() -> None:
    engine = Scripted([ids_of("<tool_call>{</tool_call><|im_end|>"), ids_of("x<|im_end|>")])
    (episode,) = played(engine, Here(lambda: "1"))
    assert "must be JSON" in episode.messages[1]["content"]
    assert (episode.n_calls, episode.n_failures) == (1, 1)
    assert episode.rollout.finish_reason == "stop"


def test_a_tool_that_raises_and_one_that_does_not_exist_are_observations() -> None:
    def fails() -> str:
        raise KeyError("no such key")

    unknown = ids_of('<tool_call>{"name": "gone"}</tool_call><|im_end|>')
    (episode,) = played(Scripted([ids_of(CALL), unknown, ids_of("x<|im_end|>")]), Here(fails))
    said = [message["content"] for message in episode.messages if message["role"] == "tool"]
    assert said == [str({"error": "'no such key'"}), "{'error': 'Tool gone not found.'}"]
    assert (episode.n_calls, episode.n_failures) == (2, 2)


def test_the_limit_on_tool_rounds_ends_the_episode_with_its_call_not_made() -> None:
    calls: list[int] = []
    engine = Scripted([ids_of(CALL)] * 3)
    (episode,) = played(engine, Here(lambda: calls.append(1) or "1"), limits=Limits(100_000, tool_rounds=1))
    assert (len(calls), episode.limit, episode.rollout.finish_reason) == (1, "turns", "length")
    assert episode.turn_ends[-1] == len(episode.rollout.completion_ids)


def test_results_that_leave_no_room_are_left_out() -> None:
    longest = len(ids_of(CALL)) + 20
    (episode,) = played(Scripted([ids_of(CALL)]), Here(lambda: "x" * 100), longest=longest)
    assert (episode.limit, episode.rollout.finish_reason) == ("tokens", "length")
    assert episode.rollout.completion_ids == ids_of(CALL)
    assert [message["role"] for message in episode.messages] == ["assistant"]


def test_the_context_is_a_limit_too_and_a_turn_that_was_cut_calls_nothing() -> None:
    calls: list[int] = []
    limits = Limits(context=len(PROMPT) + len(ids_of(CALL)) - 1)
    (episode,) = played(Scripted([ids_of(CALL)]), Here(lambda: calls.append(1) or "1"), limits=limits)
    assert (calls, episode.limit) == ([], "tokens")


def test_one_call_of_the_engine_serves_episodes_with_different_room() -> None:
    long = (*PROMPT, *ids_of("x" * 30))
    limits = Limits(context=len(long) + 10)
    episodes = played(Scripted([ids_of("y" * 40)]), Here(str), limits=limits, starts=[start(), start(prompt=long)])
    assert [len(episode.rollout.completion_ids) for episode in episodes] == [40, 10]
    assert [episode.rollout.finish_reason for episode in episodes] == ["stop", "length"]


def test_seconds_end_an_episode_before_its_next_turn() -> None:
    (episode,) = played(Scripted([ids_of(CALL)]), Here(lambda: "1"), limits=Limits(100_000, seconds=1e-9))
    assert (episode.limit, len(episode.turn_ends)) == ("seconds", 1)


@pytest.mark.parametrize("when", ["reset", "calls", "finish"])
def test_an_environment_that_fails_ends_its_episode_with_an_error(when: str) -> None:
    fault = EnvironmentFault("took longer than 1 seconds")
    (episode,) = played(Scripted([ids_of(CALL), ids_of("x<|im_end|>")]), Here(lambda: "1", **{when: fault}))
    assert episode.rollout.finish_reason == "error"
    assert episode.error == "took longer than 1 seconds"


def test_an_engine_that_fails_ends_the_episode() -> None:
    (episode,) = played(Scripted([ids_of("x")], reason="error"), Here(str))
    assert (episode.rollout.finish_reason, episode.error) == ("error", "")


def test_what_reset_says_is_in_the_prompt_and_a_prompt_without_room_is_an_error() -> None:
    engine = Scripted([ids_of("x<|im_end|>")])
    (episode,) = played(engine, Here(str, reset={"observation": " now"}))
    assert "q now" in TOKENIZER.decode(episode.rollout.prompt_ids)
    assert episode.observation == " now"
    (episode,) = played(
        Scripted([]), Here(str, reset={"observation": "x" * 50}), limits=Limits(context=len(PROMPT) + 9)
    )
    assert (episode.rollout.finish_reason, episode.rollout.completion_ids) == ("error", ())
    assert "leaves no room" in episode.error


def test_a_turn_that_a_stop_string_ended_is_closed_before_the_results() -> None:
    said = ids_of(CALL)[:-1]  # no <|im_end|>
    (episode,) = played(Scripted([said, ids_of("x<|im_end|>")]), Here(lambda: "1"))
    assert episode.rollout.completion_ids[len(said)] == TOKENIZER.eos_token_id
    assert episode.rollout.is_sampled is not None
    assert not episode.rollout.is_sampled[len(said)]


def test_each_turn_may_earn_something() -> None:
    earned = {"results": [["1", False]], "reward": 0.5}
    (episode,) = played(Scripted([ids_of(CALL)] * 2), Here(str, calls=earned), limits=Limits(100_000, tool_rounds=1))
    assert episode.turn_rewards == (0.5, 0.5)


def test_megabytes_that_cannot_fit_are_never_encoded() -> None:
    def refuses(messages: Sequence[Mapping[str, Any]], is_ended: bool) -> tuple[int, ...]:
        raise AssertionError

    dialogue = replace(DIALOGUE, observe=refuses, longest_token=20)
    room = 100
    sampling = Sampling(max_completion_length=len(ids_of(CALL)) + room)
    reply = "x" * (20 * room + 1)
    (episode,) = play(Scripted([ids_of(CALL)]), Here(lambda: reply), dialogue, [start()], sampling, WIDE)
    assert (episode.limit, episode.rollout.completion_ids) == ("tokens", ids_of(CALL))
    limits = Limits(context=room)
    environments = Here(str, reset={"observation": reply})
    (episode,) = play(Scripted([]), environments, dialogue, [start()], sampling, limits)
    assert "reset said 2001 characters" in episode.error
