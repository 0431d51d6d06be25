"""Environments for tiny agents; nothing heavy is imported here, as worker processes import it."""

from __future__ import annotations

import os
import time
from typing import Any


class Buttons:
    """An episode earns what its presses add up to; each press says how often it was pressed."""

    def reset(self, start: int, **columns: Any) -> str | None:
        self.presses = 0
        self.start = start
        return "7" if start == 2 else None

    def press(self) -> int:
        """Presses the button."""
        self.presses += 1
        return self.presses

    def get_turn_reward(self) -> float:
        return float(self.presses)

    def get_reward(self) -> float:
        return float(self.presses > 0)


class Hanging(Buttons):
    """Hangs, dies and raises, each in one row of three."""

    def press(self) -> int:
        """Presses the button."""
        if self.start == 0:
            time.sleep(60)
        if self.start == 1:
            os._exit(1)
        raise SystemExit


def presses(environments: list[Any], completions: list[list[dict[str, Any]]], **columns: Any) -> list[float]:
    """A reward function that reads environments and messages."""
    for environment, messages in zip(environments, completions, strict=True):
        # Results that no longer fit are in no message, and end their episode.
        assert environment.presses >= sum(
            message["role"] == "tool" and "error" not in message["content"] for message in messages
        )
    return [float(environment.presses) for environment in environments]


class Raising(Buttons):
    """Cannot begin one row of three."""

    def reset(self, start: int, **columns: Any) -> str | None:
        if start == 0:
            raise RuntimeError("no such start")
        return super().reset(start, **columns)


class Unmade(Buttons):
    """Cannot be made, in any episode."""

    def __init__(self) -> None:
        raise RuntimeError("no such server")


class Shouting(Buttons):
    """Its results are no plain text."""

    def press(self) -> str:  # type: ignore[override]
        """Presses the button."""
        return f"<script>alert({super().press()})</script>\x1b[2J"


class Counting:
    """Speaks as the user, without a tool, and has the last word after two replies."""

    def reset(self, **columns: Any) -> None:
        self.replies = 0

    def get_reply(self, message: dict[str, Any]) -> list[dict[str, Any]] | None:
        if message["is_cut"] or self.replies == 2:
            return None
        self.replies += 1
        return [{"role": "user", "content": str(self.replies)}]

    def get_reward(self) -> float:
        return float(self.replies)


class Silent:
    """Has a tool and no reward."""

    def reset(self, **columns: Any) -> None:
        return None

    def press(self) -> int:
        """Presses the button."""
        return 1
