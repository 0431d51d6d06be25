"""What a dry run shows: tables whose cells are data, so that no text can style, move or hide anything."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastrl.report.completions import CompletionSample, visible

TAIL = 160  # characters of a prompt that are shown: its end, where the question is


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of plain text; markup in them stays text."""
    table = Table(title=title, show_lines=True)
    for name in header:
        table.add_column(Text(visible(name)))
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    Console().print(table)


def completion_rows(
    samples: Sequence[CompletionSample], texts: Sequence[tuple[str, str]], facts: Sequence[tuple[str, int]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of judged completions.

    Args:
        samples: what the rewards said.
        texts: (prompt, completion) of each as the model saw and wrote them, special tokens included.
        facts: (finish reason, tokens) of each.
    """
    names = list(samples[0].rewards)
    header = ["prompt ends in", "completion", *names, "reward", "finish", "tokens"]
    rows = [
        [
            prompt if len(prompt) <= TAIL else f"… {prompt[-TAIL:]}",
            completion,
            *(_number(sample.rewards[name]) for name in names),
            _number(sample.reward),
            reason,
            str(tokens),
        ]
        for sample, (prompt, completion), (reason, tokens) in zip(samples, texts, facts, strict=True)
    ]
    return header, rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
