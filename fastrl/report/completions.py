"""`completions.jsonl`: what the model wrote and what the rewards said about it; and how to show such text safely."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrl.report.log import JsonLines, read_log
from fastrl.rewards import Scores

_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class CompletionSample:
    """One completion as it is shown.

    Attributes:
        prompt: text or message list.
        completion: text or message list.
        rewards: reward name -> its value; None where it did not judge or failed.
        reward: the weighted sum; None when the completion was left out.
        advantage: as trained; None before it is known.
        extra: further columns, from `log_extra`.
    """

    prompt: Any
    completion: Any
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def samples_of(
    prompts: Sequence[object],
    completions: Sequence[object],
    names: Sequence[str],
    scores: Scores,
    *,
    count: int,
    advantages: Sequence[float] | None = None,
) -> list[CompletionSample]:
    """`count` samples spread evenly over a batch of S, so that they come from different groups.

    Args:
        prompts, completions: [S] text or message lists.
        names: [R] of the rewards, in the order they were given to `score`.
        scores: of the same batch.
        advantages: [S] or None.
    """
    size = len(completions)
    count = min(count, size)
    return [
        CompletionSample(
            prompt=prompts[s],
            completion=completions[s],
            rewards={name: values[s] for name, values in zip(names, scores.values, strict=True)},
            reward=scores.total[s],
            advantage=None if advantages is None else float(advantages[s]),
            extra={column: values[s] for column, values in scores.extra.items()},
        )
        for s in (index * size // count for index in range(count))
    ]


class CompletionsLog:
    """`completions.jsonl`: one line `{"step", "prompt", "completion", "rewards", "reward", ...}` per sample."""

    def __init__(self, path: Path | str) -> None:
        self._lines = JsonLines(path)

    def write(self, step: int, samples: Sequence[CompletionSample]) -> None:
        """Append the samples of one step. Extra values that JSON does not know are written as their text."""
        for sample in samples:
            self._lines.append(
                {
                    "step": step,
                    "prompt": _jsonable(sample.prompt),
                    "completion": _jsonable(sample.completion),
                    "rewards": dict(sample.rewards),
                    "reward": sample.reward,
                    "advantage": _finite(sample.advantage),
                    "extra": {column: _jsonable(value) for column, value in sample.extra.items()},
                }
            )

    @property
    def offset(self) -> int:
        """See `JsonLines.offset`."""
        return self._lines.offset

    def truncate_to(self, offset: int) -> None:
        """See `JsonLines.truncate_to`."""
        self._lines.truncate_to(offset)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._lines.close()


def read_completions(path: Path | str) -> list[tuple[int, CompletionSample]]:
    """(step, sample) of every whole line, in order."""
    return [
        (
            record["step"],
            CompletionSample(
                record["prompt"],
                record["completion"],
                record["rewards"],
                record["reward"],
                record["advantage"],
                record["extra"],
            ),
        )
        for record in read_log(path)
    ]


def shown_text(text_or_messages: object) -> str:
    """Text as written; a message list as one paragraph per message, headed by its role, with its tool calls."""
    if isinstance(text_or_messages, str):
        return visible(text_or_messages)
    if not isinstance(text_or_messages, list | tuple):
        return visible(str(text_or_messages))
    parts = []
    for message in text_or_messages:
        is_message = isinstance(message, Mapping) and "role" in message
        parts.append(f"[{message['role']}] {message.get('content') or ''}" if is_message else str(message))
        parts += [f"-> {_shown_call(call)}" for call in (message.get("tool_calls") or () if is_message else ())]
    return visible("\n".join(parts))


def _shown_call(call: object) -> str:
    """A tool call as a reader would write it: name(argument=value)."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return str(call)
    arguments = function.get("arguments")
    if not isinstance(arguments, Mapping):
        return f"{function.get('name')}({arguments})"
    return f"{function.get('name')}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def visible(text: str) -> str:
    r"""Text with everything that could act on a terminal or reorder a line spelled out: "\x1b" for an escape.

    A model under training writes whatever pays; its samples must not move the cursor or hide what they say.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return character
    if character in _BIDIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs"):
        return character.encode("unicode_escape").decode()
    return character


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    """The value when JSON holds it exactly, else its text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)
