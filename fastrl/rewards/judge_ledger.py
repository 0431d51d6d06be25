"""What a judge spent and what it said, in one SQLite file that outlives runs, and workers that are killed.

A request is paid before it is sent, at the most it can cost; the rest comes back with the answer. Whatever dies in
between, and however many processes ask at once, the sum never passes the budget.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from fastrl.rewards.judge_config import Budget, Price

_NANO = 10**9
_SCHEMA = """
CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 0), calls INTEGER, tokens INTEGER, nano INTEGER);
CREATE TABLE IF NOT EXISTS breaker (id INTEGER PRIMARY KEY CHECK (id = 0), failures INTEGER, open_until REAL);
CREATE TABLE IF NOT EXISTS verdict (key TEXT PRIMARY KEY, value TEXT);
INSERT OR IGNORE INTO spent VALUES (0, 0, 0, 0);
INSERT OR IGNORE INTO breaker VALUES (0, 0, 0);
"""


class BudgetError(RuntimeError):
    """The next request could pass the budget, so it was not sent."""


class BreakerError(RuntimeError):
    """The endpoint failed many times in a row and is left alone for a while; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Counters of a ledger: requests, tokens, and cost in the currency of the price."""

    calls: int
    tokens: int
    cost: float


@dataclass(frozen=True, slots=True)
class Payment:
    """What was set aside for one request: tokens of prompt and reply, and their cost in billionths."""

    tokens: int
    nano: int


class Ledger:
    """Owner of the connection to the file; every method is one transaction."""

    def __init__(self, path: str, budget: Budget, price: Price) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._budget, self._price, self._path = budget, price, path
        self._file = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        try:
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise ValueError(f"the judge's ledger {path} cannot be used: {error}; remove it or name another") from None

    def pay(self, prompt_tokens: int, reply_tokens: int) -> Payment:
        """Set aside one call and the most it can cost.

        Raises:
            BudgetError: it could pass the budget.
        """
        tokens = prompt_tokens + reply_tokens
        nano = self._nano(prompt_tokens, reply_tokens)
        most = self._budget
        paid = self._file.execute(
            "UPDATE spent SET calls = calls + 1, tokens = tokens + :tokens, nano = nano + :nano WHERE "
            "(:most_calls IS NULL OR calls + 1 <= :most_calls) AND "
            "(:most_tokens IS NULL OR tokens + :tokens <= :most_tokens) AND "
            "(:most_nano IS NULL OR nano + :nano <= :most_nano)",
            {
                "tokens": tokens,
                "nano": nano,
                "most_calls": most.calls,
                "most_tokens": most.tokens,
                "most_nano": None if most.cost is None else int(most.cost * _NANO),
            },
        )
        if paid.rowcount != 1:
            have = self.spent()
            raise BudgetError(
                f"the judge's budget is spent: {have.calls} calls, {have.tokens} tokens and {have.cost:g} of "
                f"calls {most.calls}, tokens {most.tokens}, cost {most.cost} (None is no limit), and a request may "
                f"take {tokens} tokens; raise budget, or name another ledger than {self._path}"
            )
        return Payment(tokens, nano)

    def settle(self, payment: Payment, prompt_tokens: int, reply_tokens: int) -> None:
        """Replace what was set aside by what the endpoint says it used; 0 for a request it refused."""
        self._file.execute(
            "UPDATE spent SET tokens = tokens + ?, nano = nano + ?",
            (prompt_tokens + reply_tokens - payment.tokens, self._nano(prompt_tokens, reply_tokens) - payment.nano),
        )

    def spent(self) -> Spent:
        """The counters since the file was made."""
        calls, tokens, nano = self._file.execute("SELECT calls, tokens, nano FROM spent").fetchone()
        return Spent(calls, tokens, nano / _NANO)

    def admit(self, breaker_seconds: float) -> None:
        """Let a request pass unless the endpoint counts as down; after the pause one passes and the rest wait for it.

        Raises:
            BreakerError: it does.
        """
        now = time.time()
        # Whoever moves the end of an expired pause is the one that tries.
        tries = self._file.execute(
            "UPDATE breaker SET open_until = ? WHERE open_until > 0 AND open_until <= ?", (now + breaker_seconds, now)
        )
        failures, open_until = self._file.execute("SELECT failures, open_until FROM breaker").fetchone()
        if open_until > now and tries.rowcount != 1:
            raise BreakerError(
                f"the judge's endpoint failed {failures} times in a row; not asked for another {open_until - now:.1f} s"
            )

    def report(self, *, is_up: bool, breaker_failures: int, breaker_seconds: float) -> None:
        """Count a failure of the endpoint, or forget them all."""
        if is_up:
            self._file.execute("UPDATE breaker SET failures = 0, open_until = 0 WHERE failures > 0")
            return
        self._file.execute(
            "UPDATE breaker SET failures = failures + 1, "
            "open_until = CASE WHEN failures + 1 >= ? THEN ? ELSE open_until END",
            (breaker_failures, time.time() + breaker_seconds),
        )

    def verdict(self, key: str) -> Any | None:
        """What was said before under this key; None when nothing was."""
        found = self._file.execute("SELECT value FROM verdict WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def remember(self, key: str, value: Mapping[str, Any] | str) -> None:
        """Keep a verdict."""
        self._file.execute("INSERT OR REPLACE INTO verdict VALUES (?, ?)", (key, json.dumps(value)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _nano(self, prompt_tokens: int, reply_tokens: int) -> int:
        """Cost in billionths, rounded up. A price is per million tokens."""
        return ceil((prompt_tokens * self._price.input + reply_tokens * self._price.output) * (_NANO // 10**6))
