"""An LLM judge as a reward: scores from a rubric, or comparisons asked in both orders; see docs/judge.md."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import fsum
from typing import Any

from fastrl.rewards.judge_client import Endpoint
from fastrl.rewards.judge_config import JudgeConfig, read_judge
from fastrl.rewards.judge_verdict import (
    comparison_question,
    read_scores,
    read_winner,
    score_question,
    share_of_win,
    weighted_score,
)
from fastrl.rewards.protocol import promises


@promises(in_process=True)  # it bounds its own time, and nearly all of that is waiting
@dataclass(frozen=True)
class Judge:
    """A reward function (`fastrl.rewards.protocol`) that asks an endpoint; values are in [0, 1].

    A completion without a verdict (endpoint down, reply unreadable twice, budget spent) gets the exception in its
    place: it is counted and leaves the batch. It never gets a 0.

    Attributes:
        config: path of the judge's YAML file; `JudgeConfig` lists its keys.
        settings: what the file says.
    """

    # A record without connections, so that it can travel to another process.
    config: str
    settings: JudgeConfig = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", read_judge(self.config))

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns of the data that it reads."""
        found = (self.settings.reference, None if self.settings.against == "group" else self.settings.against)
        return tuple(name for name in found if name is not None)

    async def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        log_extra: Callable[[str, list[object]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Sequence[object],
    ) -> list[float | Exception]:
        """[S] prompts and completions -> [S] values in [0, 1], or why there is none."""
        settings = self.settings
        none: list[object] = [None] * len(prompts)
        references = none if settings.reference is None else columns[settings.reference]
        async with Endpoint(settings) as endpoint:
            if settings.against is None:
                values, reasons = await _scored(endpoint, settings, prompts, completions, references)
            else:
                values, reasons = await _compared(endpoint, settings, prompts, completions, references, columns)
            measured = endpoint.metrics()
        if log_metric is not None:
            for name, value in measured.items():
                log_metric(f"judge/{name}", value)
        if log_extra is not None:
            log_extra("judge_reason", reasons)
        return values


async def _scored(
    endpoint: Endpoint,
    settings: JudgeConfig,
    prompts: Sequence[object],
    completions: Sequence[object],
    references: Sequence[object],
) -> tuple[list[float | Exception], list[object]]:
    read = partial(_read_scores, settings)
    verdicts = await _all(
        endpoint.ask(partial(score_question, settings, prompt, completion, reference), read, _nonce())
        for prompt, completion, reference in zip(prompts, completions, references, strict=True)
    )
    values: list[float | Exception] = [
        verdict
        if isinstance(verdict, Exception)
        else weighted_score(verdict["scores"], settings.criteria, settings.scale)
        for verdict in verdicts
    ]
    return values, [None if isinstance(verdict, Exception) else verdict["reason"] for verdict in verdicts]


async def _compared(
    endpoint: Endpoint,
    settings: JudgeConfig,
    prompts: Sequence[object],
    completions: Sequence[object],
    references: Sequence[object],
    columns: dict[str, Sequence[object]],
) -> tuple[list[float | Exception], list[object]]:
    """The share of its comparisons that each completion wins; one that failed leaves its completions without value."""
    if settings.against == "group":
        games = ring(prompts, settings.opponents)
        others = [completions[right] for _, right in games]
    else:
        games = [(place, -1) for place in range(len(prompts))]
        others = list(columns[str(settings.against)])
    verdicts = await _all(
        endpoint.ask(partial(comparison_question, settings, prompts[left], *shown, references[left]), _winner, _nonce())
        for (left, _), other in zip(games, others, strict=True)
        for shown in ((completions[left], other), (other, completions[left]))
    )
    won: list[list[float | Exception]] = [[] for _ in prompts]
    reasons: list[object] = [None] * len(prompts)
    for (left, right), first, second in zip(games, verdicts[::2], verdicts[1::2], strict=True):
        failed = next((each for each in (first, second) if isinstance(each, Exception)), None)
        share = 0.0 if failed is not None else share_of_win(first["winner"], second["winner"])
        won[left].append(share if failed is None else failed)
        if right >= 0:
            won[right].append(1.0 - share if failed is None else failed)
        if failed is None:
            reasons[left] = first["reason"]
    return [_mean(shares) for shares in won], reasons


def ring(prompts: Sequence[object], opponents: int) -> list[tuple[int, int]]:
    """Who meets whom: within each group of equal prompts, everyone meets the next `opponents`; no pair twice.

    Args:
        prompts: [S]; equal ones are a group.

    Returns:
        Places (left, right). A completion that is alone in its group meets nobody.
    """
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(repr(prompt), []).append(place)
    pairs: dict[frozenset[int], tuple[int, int]] = {}
    for places in groups.values():
        n = len(places)
        for i in range(n):
            for step in range(1, min(opponents, n - 1) + 1):
                left, right = places[i], places[(i + step) % n]
                pairs.setdefault(frozenset((left, right)), (left, right))
    return list(pairs.values())


def _mean(shares: Sequence[float | Exception]) -> float | Exception:
    failed = next((share for share in shares if isinstance(share, Exception)), None)
    if failed is not None:
        return failed
    if not shares:
        return ValueError("a comparison within the group needs two completions of a prompt; set num_generations")
    return fsum(share for share in shares if not isinstance(share, Exception)) / len(shares)


async def _all(questions: Any) -> list[Any]:
    """Every verdict, or the exception in its place; an interrupt is raised."""
    found = await asyncio.gather(*(_caught(question) for question in questions))
    return list(found)


async def _caught(question: Awaitable[Any]) -> Any:
    try:
        return await question
    except Exception as error:
        return error


def _read_scores(settings: JudgeConfig, reply: str, nonce: str) -> dict[str, Any]:
    return read_scores(reply, nonce, settings.criteria, settings.scale)


def _winner(reply: str, nonce: str) -> dict[str, Any]:
    return read_winner(reply, nonce)


def _nonce() -> str:
    return secrets.token_hex(8)
