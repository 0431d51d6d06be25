"""Tables of a dry run: hostile text in a cell stays text."""

from __future__ import annotations

import pytest

from fastrl.report.completions import CompletionSample
from fastrl.report.preview import TAIL, completion_rows, print_table


def test_markup_and_control_characters_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's and Mistral's templates write [INST] and [/INST], which are tags to rich."""
    monkeypatch.setenv("COLUMNS", "100")
    print_table("two rows", ("prompt [x]", "text"), [["[INST] 2+2 [/INST]", "[bold]4[/bold]\x1b[2J"], ["a", "b"]])
    printed = capsys.readouterr().out
    for text in ("two rows", "prompt [x]", "[INST] 2+2 [/INST]", "[bold]4[/bold]\\x1b[2J"):
        assert text in printed
    assert "\x1b[2J" not in printed


def test_a_row_says_what_was_asked_answered_and_judged() -> None:
    sample = CompletionSample("?", "4", {"numeric": 1.0, "judge": None}, 0.75)
    header, rows = completion_rows([sample], [("x" * TAIL + "?", "4<end>")], [("stop", 2)])
    assert header == ["prompt ends in", "completion", "numeric", "judge", "reward", "finish", "tokens"]
    assert rows == [["… " + "x" * (TAIL - 1) + "?", "4<end>", "1", "-", "0.75", "stop", "2"]]
