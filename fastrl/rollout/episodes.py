"""Episodes: turns of the model and results of tools, until the model answers without a call or a limit is reached.

    completion = turn 1 (sampled) + observation 1 (not sampled) + turn 2 (sampled) + ...

Tokens in, tokens out: a turn's tokens are kept as the engine gave them and are the prefix of the next turn's prompt;
only what lies between two turns is ever encoded. All live episodes go to the engine together, and their tools run
together. The sample of a turn depends on (run seed, prompt, sample, turn) alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Protocol

from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.seeds import request_seed
from fastrl.types import FinishReason, Rollout

Observe = Callable[[Sequence[Mapping[str, Any]], bool], tuple[int, ...]]
Request = Mapping[str, Any]


class Turn(Protocol):
    """What a model said: see `fastrl.data.tool_calls.ParsedTurn`."""

    @property
    def message(self) -> dict[str, Any]: ...
    @property
    def errors(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class EnvironmentFault:
    """An environment that raised, hung or died, and why: its episode ends without a reward."""

    message: str


class Environments(Protocol):
    """Where environments live: `answer` of `fastrl.rollout.environment.Environment`, for many at once."""

    def ask(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Any] | EnvironmentFault]:
        """Answers by seat; each seat is one environment, made at its first reset and reset for every episode."""
        ...

    def close(self) -> None:
        """Let go of the environments; a second call does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Dialogue:
    """How turns and results become tokens and messages; made from the tokenizer's chat template.

    Attributes:
        parse: (ids of a turn, ids before it) -> what was said.
        observe: (tool messages, whether the turn closed with a control token) -> ids between two turns.
        control_ids: ids that close a turn.
        replies: whether the environment answers turns itself, those without calls too, and says when it is over.
        longest_token: most characters that one token stands for: megabytes that cannot fit are not even encoded.
    """

    parse: Callable[[Sequence[int], Sequence[int]], Turn]
    observe: Observe
    control_ids: frozenset[int]
    replies: bool = False
    longest_token: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends an episode that would go on; each gives finish_reason "length".

    Attributes:
        context: most tokens the model holds, prompt and completion together.
        tool_rounds: most times that an episode's tool calls are run; None is no limit.
        seconds: an episode that has taken longer has no further turn; None is no limit.
    """

    context: int
    tool_rounds: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Where an episode begins.

    Attributes:
        ids: of the prompt.
        columns: of the row, for `reset`.
        seed: of the episode; turn k is sampled with `request_seed(seed, k, 0)`.
        reopen: what the prompt's ids become when `reset` returns an observation.
    """

    ids: tuple[int, ...]
    columns: Mapping[str, Any]
    seed: int
    reopen: Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode, over.

    Attributes:
        rollout: all its tokens; `is_sampled` is False for observations, whose log-probability is 0. finish_reason
            "stop" when the model answered, "length" when a limit did it, "error" when engine or environment failed.
        messages: the completion: the model's and the tools', in order.
        turn_ends: number of completion tokens up to the end of each turn of the model.
        turn_rewards: what the environment said each turn earned; None where it said nothing.
        n_calls: tool calls, unreadable ones included.
        n_failures: those that gave an error.
        observation: what `reset` added to the prompt.
        reward: of `get_reward`; a mapping {"fault": text} when that failed.
        state: the environment's public attributes at the end.
        error: why the environment ended the episode; "" when it did not.
        limit: "turns", "tokens" or "seconds" when a limit ended it, else "".
        seconds: from the first to the last turn.
    """

    rollout: Rollout
    messages: list[dict[str, Any]]
    turn_ends: tuple[int, ...]
    turn_rewards: tuple[float | None, ...] = ()
    n_calls: int = 0
    n_failures: int = 0
    observation: str | None = None
    reward: float | Mapping[str, str] | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    limit: str = ""
    seconds: float = 0.0


def play(
    engine: Engine,
    environments: Environments,
    dialogue: Dialogue,
    starts: Sequence[Start],
    sampling: Sampling,
    limits: Limits,
) -> list[Episode]:
    """Play one episode per start, in order.

    Args:
        sampling: `max_completion_length` bounds a whole episode, observations included.

    Cost: one `engine.generate` per turn of the longest episode.
    """
    lives = [_Life(start, dialogue, sampling, limits) for start in starts]
    answers = environments.ask({seat: {"reset": start.columns} for seat, start in enumerate(starts)})
    for seat, life in enumerate(lives):
        life.reset(answers[seat])
    turn = 0
    while alive := _ready(lives):
        _sample(engine, [lives[seat] for seat in alive], sampling, turn)
        calls = {seat: lives[seat].said() for seat in alive}
        # An episode without calls is asked too: what its last turn earned is the environment's to say.
        asked = {seat: lives[seat].request(wanted) for seat, wanted in calls.items() if wanted is not None}
        results = environments.ask(asked)
        for seat in asked:
            lives[seat].heard(results[seat])
        turn += 1
    finished = environments.ask({seat: {"finish": True} for seat, life in enumerate(lives) if not life.error})
    return [life.episode(finished.get(seat)) for seat, life in enumerate(lives)]


class _Life:
    """An episode while it lasts."""

    def __init__(self, start: Start, dialogue: Dialogue, sampling: Sampling, limits: Limits) -> None:
        self.start = start
        self.dialogue = dialogue
        self.longest = sampling.max_completion_length
        self.limits = limits
        self.prompt = start.ids
        self.ids: list[int] = []
        self.logprob: list[float] = []
        self.is_sampled: list[bool] = []
        self.version: list[int] = []
        self.messages: list[dict[str, Any]] = []
        self.turn_ends: list[int] = []
        self.turn_rewards: list[float | None] = []
        self.errors: tuple[str, ...] = ()
        self.turn_begin = self.n_calls = self.n_failures = self.tool_rounds = 0
        self.finish: FinishReason | None = None
        self.observation: str | None = None
        self.error = self.limit = ""
        self.began = monotonic()
        self.seconds = 0.0

    def reset(self, answer: dict[str, Any] | EnvironmentFault) -> None:
        if isinstance(answer, EnvironmentFault):
            self.fail(answer.message)
        elif answer["observation"] is not None:
            if len(answer["observation"]) > self.limits.context * self.dialogue.longest_token:
                self.fail(f"reset said {len(answer['observation'])} characters, more than the model's context holds")
                return
            self.observation = answer["observation"]
            self.prompt = self.start.reopen(answer["observation"])

    def fail(self, message: str) -> None:
        self.error, self.finish = message, "error"

    def stop(self, limit: str) -> None:
        self.limit, self.finish = limit, "length"

    def room(self) -> int:
        """Tokens that the episode may still have."""
        return min(self.longest, self.limits.context - len(self.prompt)) - len(self.ids)

    def append(self, rollout: Rollout) -> None:
        """Take a turn; one call of the engine has one limit, so a turn may be longer than this episode's room."""
        n = min(len(rollout.completion_ids), self.room())
        self.turn_begin = len(self.ids)
        self.ids += rollout.completion_ids[:n]
        self.logprob += rollout.logprob[:n]
        self.is_sampled += [True] * n
        version = rollout.token_version or (rollout.policy_version,) * n
        self.version += version[:n]
        self.turn_ends.append(len(self.ids))
        self.turn_rewards.append(None)
        if rollout.finish_reason == "error":
            self.finish = "error"
        elif rollout.finish_reason == "length" or n < len(rollout.completion_ids):
            self.stop("tokens")

    def said(self) -> list[list[Any]] | None:
        """The calls to make after a turn: [] when there are none, None when nothing more is asked of anybody."""
        begin = self.turn_begin
        turn = self.dialogue.parse(self.ids[begin:], [*self.prompt, *self.ids[:begin]])
        self.messages.append(turn.message)
        self.errors = turn.errors
        if self.finish == "error":
            return None
        calls = [
            [call["function"]["name"], call["function"]["arguments"]] for call in turn.message.get("tool_calls", ())
        ]
        if self.finish is not None:  # cut off: what looks like a call may be half of one
            return []
        if not calls and not turn.errors and not self.dialogue.replies:
            self.finish = "stop"
        elif self.limits.tool_rounds is not None and self.tool_rounds >= self.limits.tool_rounds:
            self.stop("turns")
            return []
        return calls

    def request(self, calls: list[list[Any]]) -> Request:
        """What a turn asks of the environment."""
        if not self.dialogue.replies:
            return {"calls": calls}
        return {"said": self.messages[-1], "is_cut": self.finish is not None}

    def heard(self, answer: dict[str, Any] | EnvironmentFault) -> None:
        """Take the tools' results, when there were calls, and what the turn earned."""
        if isinstance(answer, EnvironmentFault):
            self.fail(answer.message)
            return
        self.turn_rewards[-1] = answer["reward"]
        if self.finish is not None:
            return
        observed = self._observed(answer)
        if not observed:
            self.finish = "stop"
            return
        self.tool_rounds += 1
        if self.limits.seconds is not None and monotonic() - self.began > self.limits.seconds:
            self.stop("seconds")
            return
        if sum(len(each["content"]) for each in observed) > self.room() * self.dialogue.longest_token:
            self.stop("tokens")
            return
        ids = self.dialogue.observe(observed, bool(self.ids) and self.ids[-1] in self.dialogue.control_ids)
        if len(ids) >= self.room():
            self.stop("tokens")  # the results would leave the model no room to use them
            return
        self.messages += observed
        self.ids += ids
        self.logprob += [0.0] * len(ids)
        self.is_sampled += [False] * len(ids)
        self.version += [self.version[-1] if self.version else 0] * len(ids)

    def _observed(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages that follow a turn; none when the environment says that it was the last."""
        names = [call["function"]["name"] for call in self.messages[-1].get("tool_calls", ())]
        if self.dialogue.replies:
            self.n_calls += len(names) + len(self.errors)
            self.n_failures += len(self.errors)
            return answer["messages"] or []
        results = [*zip(names, answer["results"], strict=True)]
        results += [("unknown", [str({"error": error}), True]) for error in self.errors]
        self.n_calls += len(results)
        self.n_failures += sum(bool(is_error) for _, (_, is_error) in results)
        return [{"role": "tool", "name": name, "content": text} for name, (text, _) in results]

    def episode(self, answer: dict[str, Any] | EnvironmentFault | None) -> Episode:
        if isinstance(answer, EnvironmentFault):
            self.fail(answer.message)
        found = answer if isinstance(answer, dict) else {"reward": None, "state": {}}
        assert self.finish is not None
        version = self.version[0] if self.version else 0
        rollout = Rollout(
            prompt_ids=tuple(self.prompt),
            completion_ids=tuple(self.ids),
            logprob=tuple(self.logprob),
            finish_reason=self.finish,
            policy_version=version,
            is_sampled=tuple(self.is_sampled),
            token_version=None if all(each == version for each in self.version) else tuple(self.version),
        )
        return Episode(
            rollout=rollout,
            messages=self.messages,
            turn_ends=tuple(self.turn_ends),
            turn_rewards=tuple(self.turn_rewards),
            n_calls=self.n_calls,
            n_failures=self.n_failures,
            observation=self.observation,
            reward=found["reward"],
            state=found["state"],
            error=self.error,
            limit=self.limit,
            seconds=self.seconds,
        )


def _ready(lives: Sequence[_Life]) -> list[int]:
    """Seats of the episodes that have another turn; one whose prompt leaves no room for a token never began."""
    for life in lives:
        if life.finish is None and life.room() < 1:
            life.fail(f"the prompt has {len(life.prompt)} tokens with what reset said, which leaves no room to sample")
    return [seat for seat, life in enumerate(lives) if life.finish is None]


def _sample(engine: Engine, lives: Sequence[_Life], sampling: Sampling, turn: int) -> None:
    """One turn of every live episode."""
    rollouts = engine.generate(
        [[*life.prompt, *life.ids] for life in lives],
        replace(sampling, max_completion_length=max(life.room() for life in lives)),
        seeds=[request_seed(life.start.seed, turn, 0) for life in lives],
    )
    for life, rollout in zip(lives, rollouts, strict=True):
        life.append(rollout)
        life.seconds = monotonic() - life.began
