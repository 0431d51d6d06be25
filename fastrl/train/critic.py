"""Who criticises, revises and scores: a model in this process, or a judge behind an endpoint."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from fastrl.data.tokenize import render_prompt
from fastrl.rewards.judge_client import Endpoint
from fastrl.rewards.judge_config import JudgeConfig
from fastrl.rewards.judge_verdict import VerdictError, read_scores, score_question, weighted_score
from fastrl.rollout.builtin import BuiltinEngine, context_length
from fastrl.rollout.engine import Sampling
from fastrl.train.judge import verdict_probability

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be scored: the prompt as text, the answer, the principle, and the question made of them."""

    prompt: str
    response: str
    principle: str
    question: str


class Critic(Protocol):
    """What a constitutional loop needs; None stands for "failed", and is never a text or a score."""

    def write(self, requests: Sequence[str], *, seeds: Sequence[int], length: int) -> list[str | None]:
        """A reply of at most `length` tokens to each request; None also when it was cut off."""

    def scores(self, cases: Sequence[Case]) -> list[float | None]:
        """How well each answer keeps its principle, in [0, 1]."""

    def first_failure(self) -> str:
        """What went wrong first; "" when nothing did."""


class ModelCritic:
    """A causal language model; its score is P(first verdict) of the two, see `verdict_probability`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sampling: Sampling,
        batch_size: int,
        verdicts: tuple[str, str],
    ) -> None:
        self._model, self._tokenizer, self._verdicts = model, tokenizer, verdicts
        self._engine = BuiltinEngine(model, tokenizer, batch_size=batch_size)
        self._sampling = sampling
        self._failure = ""

    def write(self, requests: Sequence[str], *, seeds: Sequence[int], length: int) -> list[str | None]:
        """See `Critic.write`."""
        fed = self._fitting(requests)
        sampling = replace(self._sampling, max_completion_length=length)
        rollouts = self._engine.generate(list(fed.values()), sampling, seeds=[seeds[place] for place in fed])
        found: list[str | None] = [None] * len(requests)
        for place, rollout in zip(fed, rollouts, strict=True):
            if rollout.finish_reason == "stop":
                found[place] = str(self._tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)).strip()
            else:
                self._failure = self._failure or f"a reply ended with {rollout.finish_reason!r}"
        return [text or None for text in found]

    def scores(self, cases: Sequence[Case]) -> list[float | None]:
        """See `Critic.scores`."""
        found: list[float | None] = [None] * len(cases)
        places = list(self._fitting([case.question for case in cases]))
        questions = [_conversation(cases[place].question) for place in places]
        values = verdict_probability(self._model, self._tokenizer, questions, verdicts=self._verdicts)
        for place, value in zip(places, values.tolist(), strict=True):
            found[place] = value
        return found

    def first_failure(self) -> str:
        """See `Critic.first_failure`."""
        return self._failure

    def _fitting(self, requests: Sequence[str]) -> dict[int, tuple[int, ...]]:
        """Place -> token ids of the requests that leave room in the model's context."""
        room = context_length(self._model) - 8
        found = {}
        for place, request in enumerate(requests):
            ids = render_prompt(self._tokenizer, _conversation(request))
            if len(ids) <= room:
                found[place] = ids
            else:
                self._failure = self._failure or f"a request of {len(ids)} tokens does not fit the critic's context"
        return found


class EndpointCritic:
    """A judge's endpoint, with its budget, retries and ledger; scores are its number for the principle."""

    def __init__(self, settings: JudgeConfig) -> None:
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._failure = ""

    def write(self, requests: Sequence[str], *, seeds: Sequence[int], length: int) -> list[str | None]:
        """See `Critic.write`; seeds are not sent."""
        settings = replace(self._settings, max_tokens=length)
        return asyncio.run(self._all(settings, [(partial(_one_message, each), _read_text) for each in requests]))

    def scores(self, cases: Sequence[Case]) -> list[float | None]:
        """See `Critic.scores`."""
        asked = []
        for case in cases:
            one = replace(self._settings, instruction=case.principle, rubric=(), against=None, reference=None)
            question = partial(score_question, one, case.prompt, case.response, None)
            asked.append((question, partial(_read_score, one)))
        return asyncio.run(self._all(self._settings, asked))

    def first_failure(self) -> str:
        """See `Critic.first_failure`."""
        return self._failure

    async def _all(self, settings: JudgeConfig, asked: Sequence[Any]) -> list[Any]:
        async with Endpoint(settings) as endpoint:
            found = await asyncio.gather(
                *(endpoint.ask(question, read, secrets.token_hex(8)) for question, read in asked),
                return_exceptions=True,
            )
            self.counters.update(endpoint.counters)
        for each in found:
            if isinstance(each, Exception):
                self._failure = self._failure or str(each)
            elif isinstance(each, BaseException):
                raise each
        return [None if isinstance(each, Exception) else each for each in found]


def _conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _one_message(text: str, nonce: str) -> list[dict[str, str]]:
    return _conversation(text)


def _read_text(reply: str, nonce: str) -> str:
    if not reply.strip():
        raise VerdictError("the reply is empty")
    return reply.strip()


def _read_score(settings: JudgeConfig, reply: str, nonce: str) -> float:
    verdict = read_scores(reply, nonce, settings.criteria, settings.scale)
    return weighted_score(verdict["scores"], settings.criteria, settings.scale)
