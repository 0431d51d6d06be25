from __future__ import annotations

import io
import time

import pytest

from fastrl.report import CompletionSample, Panel
from fastrl.report.panel import plain_line

METRICS = {
    "reward": 0.43219,
    "loss": 0.0123,
    "tokens_per_second": 8123.0,
    "step_time": 3.42,
    "time/rollout": 3.0,
    "time/train": 1.0,
    "unknown/metric": 5.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_step_is_one_plain_line():
    assert plain_line(12, 200, METRICS) == "step 12/200  reward 0.432  loss 0.0123  tokens/s 8.12k  3.4 s"
    assert plain_line(12, None, {}) == "step 12"


def test_without_a_terminal_each_step_prints_its_line_and_nothing_else():
    stream = io.StringIO()
    with Panel("run", total_steps=2, stream=stream) as panel:
        panel.update(1, {"reward": 0.5}, CompletionSample("p", "c"))
        panel.update(2, {"reward": 1.0})
    assert stream.getvalue() == "step 1/2  reward 0.5\nstep 2/2  reward 1\n"


def test_a_terminal_can_have_plain_lines_too(terminal, monkeypatch):
    Panel("run", live=False, stream=terminal).update(1, {})
    monkeypatch.setenv("TERM", "dumb")
    Panel("run", stream=terminal).update(2, {})
    assert terminal.getvalue() == "step 1\nstep 2\n"


def test_a_terminal_shows_curves_time_split_and_a_sample_that_cannot_act_on_it(terminal):
    hostile = CompletionSample("[bold]2+2?[/bold]", "\x1b]0;owned\x07 4 [red]", {}, 0.5)
    with Panel("[b]my run[/b]", total_steps=10, stream=terminal) as panel:
        panel.update(1, METRICS, hostile)
        panel.update(3, METRICS | {"reward": 0.9})
    shown = terminal.getvalue()
    for text in ("[b]my run[/b]", "step 3/10", "left", "0.9", "▁█", "rollout 75%", "train 25%", "sample, reward 0.5"):
        assert text in shown, text
    assert "[bold]2+2?[/bold]" in shown
    assert "\\x1b]0;owned\\x07 4 [red]" in shown
    assert "\x1b]0;" not in shown
    assert "\x07" not in shown


def test_the_last_step_is_drawn_even_when_steps_are_fast(terminal):
    panel = Panel("run", stream=terminal)
    for step in range(500):
        panel.update(step, {"reward": float(step)})
    panel.close()
    panel.close()
    assert "step 499" in terminal.getvalue()
    assert terminal.getvalue().count("step ") < 250


def test_an_error_gives_the_terminal_back(terminal):
    def fail():
        with Panel("run", stream=terminal) as panel:
            panel.update(1, METRICS)
            raise RuntimeError("training failed")

    with pytest.raises(RuntimeError, match="training failed"):
        fail()
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_step_costs_less_than_two_milliseconds_without_a_terminal():
    panel = Panel("run", stream=io.StringIO())
    start = time.process_time()
    for step in range(300):
        panel.update(step, METRICS)
    assert (time.process_time() - start) / 300 < 2e-3
