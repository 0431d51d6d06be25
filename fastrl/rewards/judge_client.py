"""Asking an OpenAI-compatible endpoint: paid before it is sent, retried where that helps, remembered once read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

from fastrl.rewards.judge_config import JudgeConfig
from fastrl.rewards.judge_ledger import BreakerError, BudgetError, Ledger
from fastrl.rewards.judge_verdict import ASK_AGAIN, Messages, VerdictError

RETRIED = frozenset({408, 409, 425, 429})  # and 5xx
_MESSAGE_TOKENS = 32  # more than any chat template adds to a message
_MOST_TOKENS = 10**9  # a larger count in a reply is nonsense


class JudgeError(RuntimeError):
    """The endpoint gave no reply, or refused the question."""


class Endpoint:
    """Owner of the connection and the ledger for the length of one batch.

    Attributes:
        counters: what happened: questions, cache_hits, calls, retries, reasks, and failures by kind.
    """

    def __init__(self, config: JudgeConfig) -> None:
        from openai import AsyncOpenAI

        self.counters: Counter[str] = Counter()
        self._config = config
        self._ledger = Ledger(config.ledger, config.budget, config.price)
        self._client = AsyncOpenAI(
            base_url=config.base_url, api_key=config.api_key, max_retries=0, timeout=config.timeout
        )
        self._places = asyncio.Semaphore(config.concurrency)
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._jitter = random.Random()  # not the global generator, which belongs to the run

    async def ask(self, question: Callable[[str], Messages], read: Callable[[str, str], Any], nonce: str) -> Any:
        """The verdict on a question; the same question is asked once, now and ever.

        Args:
            question: nonce -> messages.
            read: reply, nonce -> verdict, which JSON can hold.

        Raises:
            JudgeError, VerdictError, BudgetError, BreakerError: there is no verdict.
        """
        self.counters["questions"] += 1
        key = self._key(question(""))
        found = self._ledger.verdict(key)
        if found is not None:
            self.counters["cache_hits"] += 1
            return found
        if key in self._asked:
            self.counters["cache_hits"] += 1
        else:
            self._asked[key] = asyncio.ensure_future(self._asked_once(question(nonce), read, nonce, key))
        return await asyncio.shield(self._asked[key])

    async def _asked_once(self, messages: Messages, read: Callable[[str, str], Any], nonce: str, key: str) -> Any:
        async with self._places:
            try:
                async with asyncio.timeout(self._config.deadline):
                    verdict = await self._read(messages, read, nonce)
            except TimeoutError:
                self.counters["failures/deadline"] += 1
                raise JudgeError(f"the judge gave no verdict in {self._config.deadline:g} s") from None
            except (BudgetError, BreakerError, VerdictError) as error:
                kind = {BudgetError: "budget", BreakerError: "breaker", VerdictError: "unparsable"}[type(error)]
                self.counters[f"failures/{kind}"] += 1
                raise
        self._ledger.remember(key, verdict)
        return verdict

    async def _read(self, messages: Messages, read: Callable[[str, str], Any], nonce: str) -> Any:
        """A verdict, asked for once more when the reply holds none."""
        reply = await self._reply(messages)
        try:
            return read(reply, nonce)
        except VerdictError:
            self.counters["reasks"] += 1
        again = [{"role": "assistant", "content": reply}] if reply else []
        reply = await self._reply([*messages, *again, {"role": "user", "content": ASK_AGAIN}])
        try:
            return read(reply, nonce)
        except VerdictError as error:
            raise VerdictError(f"no verdict, also when asked again: {self._scrubbed(str(error))}") from None

    async def _reply(self, messages: Messages) -> str:
        """The text of one reply, after retries; "" where the body is not what the protocol says."""
        import openai

        config = self._config
        for attempt in range(config.max_retries + 1):
            try:
                return await self._sent(messages)
            except openai.APIStatusError as error:
                is_down = error.status_code >= 500
                self._report(is_up=not is_down)
                problem = f"status {error.status_code}: {self._scrubbed(error.message)}"
                if not is_down and error.status_code not in RETRIED:
                    self.counters["failures/status"] += 1
                    raise JudgeError(f"the judge's endpoint refused the question with {problem}") from None
                least, kind = retry_after(error.response.headers.get("retry-after")), "status"
            except (openai.APIConnectionError, TimeoutError) as error:
                self._report(is_up=False)
                problem, least, kind = self._scrubbed(f"{type(error).__name__}: {error}"), 0.0, "network"
            if attempt == config.max_retries or least > config.deadline:
                break
            self.counters["retries"] += 1
            await asyncio.sleep(max(least, self._jitter.uniform(0, config.backoff * 2**attempt)))
        self.counters[f"failures/{kind}"] += 1
        raise JudgeError(f"the judge's endpoint failed {attempt + 1} times, the last with {problem}")

    async def _sent(self, messages: Messages) -> str:
        """One request: paid, sent, settled."""
        import openai

        config = self._config
        self._ledger.admit(config.breaker_seconds)
        payment = self._ledger.pay(most_tokens(messages), config.max_tokens)
        self.counters["calls"] += 1
        try:
            async with asyncio.timeout(config.timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=config.model,
                    messages=messages,  # type: ignore[arg-type]  # theirs is a union of records of this form
                    temperature=config.temperature,
                    max_tokens=config.max_tokens,
                )
        except openai.APIStatusError:
            self._ledger.settle(payment, 0, 0)  # refused; a broken connection may have been answered and billed
            raise
        self._report(is_up=True)
        text, used = read_body(response.http_response.content)
        if used is not None:
            self._ledger.settle(payment, *used)
        return text

    def _report(self, *, is_up: bool) -> None:
        failures, seconds = self._config.breaker_failures, self._config.breaker_seconds
        self._ledger.report(is_up=is_up, breaker_failures=failures, breaker_seconds=seconds)

    def _key(self, messages: Messages) -> str:
        config = self._config
        content = [config.base_url, config.model, config.temperature, config.max_tokens, messages]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _scrubbed(self, text: str) -> str:
        """A short text for a log, without the key, which endpoints like to quote."""
        short = text if self._config.api_key_env is None else text.replace(self._config.api_key, "[api key]")
        return short[:300]

    def metrics(self) -> dict[str, float]:
        """The counters of this batch, and what the ledger's file has spent since it was made."""
        spent = self._ledger.spent()
        names = ("questions", "cache_hits", "calls", "retries", "reasks")
        return {
            **{name: float(self.counters[name]) for name in names},
            **{name: float(count) for name, count in self.counters.items() if name.startswith("failures/")},
            "spent_calls": float(spent.calls),
            "spent_tokens": float(spent.tokens),
            "spent_cost": spent.cost,
        }

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._client.close()
        self._ledger.close()


def most_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """A bound on the tokens of a prompt: one per byte of UTF-8, as no byte-level tokenizer makes more of it."""
    return sum(len(message["content"].encode()) + _MESSAGE_TOKENS for message in messages) + _MESSAGE_TOKENS


def read_body(content: bytes) -> tuple[str, tuple[int, int] | None]:
    """The reply in a body and the tokens it says were used; "" and None for what is not there, cut off or no number."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return "", None
    try:
        first = found["choices"][0]
        text = "" if first.get("finish_reason") == "length" else first["message"]["content"]
    except (KeyError, IndexError, TypeError, AttributeError):
        text = ""
    return text if isinstance(text, str) else "", _used(found)


def _used(body: Any) -> tuple[int, int] | None:
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, reply = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(reply) is not int:
        return None
    return (prompt, reply) if 0 <= prompt <= _MOST_TOKENS and 0 <= reply <= _MOST_TOKENS else None


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 when it asks for nothing readable."""
    if header is None:
        return 0.0
    if header.strip().replace(".", "", 1).isdecimal():  # isdigit is also true of "²", which is no number
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - time.time())
