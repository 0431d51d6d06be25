"""What a run shows while it trains: a live panel on a terminal, one plain line per logged step anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from fastrl.report.completions import CompletionSample, shown_text
from fastrl.report.curves import short_number, sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# Shown when they are there: metric name -> label.
ROWS: Mapping[str, str] = {
    "reward": "reward",
    "eval/reward": "eval reward",
    "eval/loss": "eval loss",
    "rewards/accuracies": "accuracy",
    "accuracy": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "sampling/error_rate": "no verdict",
    "loss": "loss",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grad_norm": "grad norm",
    "tokens_per_second": "tokens/s",
}
ONLY_WHEN_NOT_ZERO = ("sampling/error_rate",)
PHASES: Mapping[str, str] = {  # metric name -> colour
    "time/rollout": "cyan",
    "time/reward": "magenta",
    "time/logprob": "yellow",
    "time/train": "green",
    "time/sync": "blue",
}
HISTORY = 512  # values kept per curve
SECONDS_BETWEEN_DRAWS = 0.1
SAMPLE_CHARACTERS = 600


def plain_line(step: int, total_steps: int | None, metrics: Mapping[str, float]) -> str:
    """One step in one line: `step 12/200  reward 0.43  loss 0.0123  ...  3.4 s`."""
    parts = [f"step {step}" if total_steps is None else f"step {step}/{total_steps}"]
    parts += [f"{label} {short_number(metrics[name])}" for name, label in ROWS.items() if _is_shown(name, metrics)]
    if "step_time" in metrics:
        parts.append(f"{metrics['step_time']:.1f} s")
    return "  ".join(parts)


def _is_shown(name: str, metrics: Mapping[str, float]) -> bool:
    return name in metrics and (metrics[name] != 0 or name not in ONLY_WHEN_NOT_ZERO)


class Panel:
    """Shows the progress of one run; owns the terminal's live region while it is open.

    On a terminal the panel is redrawn at most every SECONDS_BETWEEN_DRAWS. On any other stream each update prints
    `plain_line`, which costs microseconds and never draws.
    """

    def __init__(
        self, title: str, *, total_steps: int | None = None, live: bool = True, stream: TextIO | None = None
    ) -> None:
        """`live=False` prints plain lines on a terminal too; `stream` is standard output when None."""
        self._title = title
        self._total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._history: dict[str, deque[float]] = {}
        self._sample: CompletionSample | None = None
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._drawn = 0.0
        self._pending: tuple[int, Mapping[str, float]] | None = None
        is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live = _open_live(self._stream) if live and is_terminal else None

    def update(self, step: int, metrics: Mapping[str, float], sample: CompletionSample | None = None) -> None:
        """Show one logged step, and the newest sample when there is one."""
        if self._live is None:
            print(plain_line(step, self._total_steps, metrics), file=self._stream, flush=True)
            return
        for name in ROWS:
            if _is_shown(name, metrics):
                self._history.setdefault(name, deque(maxlen=HISTORY)).append(metrics[name])
        self._sample = sample or self._sample
        self._first_step = step if self._first_step is None else self._first_step
        self._pending = (step, metrics)
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWS:
            self._draw(self._live)

    def close(self) -> None:
        """Draw what was not drawn yet and give the terminal back; a second call does nothing."""
        if self._live is not None:
            self._draw(self._live)
            self._live.stop()
            self._live = None

    def __enter__(self) -> Panel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self, live: Live) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._drawn = time.monotonic()
        self._pending = None
        heading = f"{self._title}  {self._progress(step)}"
        live.update(panel_view(heading, self._history, metrics, self._sample), refresh=True)

    def _progress(self, step: int) -> str:
        if not self._total_steps:
            return f"step {step}"
        text = f"step {step}/{self._total_steps}"
        done = step - (self._first_step or 0)
        if done <= 0:
            return text
        left = (time.monotonic() - self._started) / done * max(0, self._total_steps - step)
        return f"{text}  {_clock(left)} left"


def panel_view(
    heading: str,
    history: Mapping[str, deque[float]],
    metrics: Mapping[str, float],
    sample: CompletionSample | None,
) -> RenderableType:
    """The panel as something rich can print: curves, the time split, one sample."""
    from rich.console import Group
    from rich.panel import Panel as Box
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    curves = Table.grid(padding=(0, 2))
    for name, label in ROWS.items():
        if name in history:
            values = list(history[name])
            strong = "bold green" if "reward" in name else "cyan"
            curves.add_row(
                Text(label), Text(short_number(values[-1]), style="bold"), Text(sparkline(values, 48), strong)
            )
    parts: list[RenderableType] = [curves]
    split = _time_split(metrics)
    if split is not None:
        parts += [Text(), split]
    if sample is not None:
        reward = "left out" if sample.reward is None else f"reward {short_number(sample.reward)}"
        parts.append(Rule(Text(f"sample, {reward}"), style="dim"))
        parts.append(Text(_end(shown_text(sample.prompt)), style="dim"))
        parts.append(Text(_end(shown_text(sample.completion))))
    return Box(Group(*parts), title=Text(heading), title_align="left")


def _time_split(metrics: Mapping[str, float]) -> RenderableType | None:
    from rich.text import Text

    seconds = {name: metrics[name] for name in PHASES if metrics.get(name, 0.0) > 0.0}
    total = sum(seconds.values())
    if not total:
        return None
    bar, legend = Text(), Text()
    for name, spent in seconds.items():
        bar.append("█" * max(1, round(48 * spent / total)), PHASES[name])
        legend.append(f"{name.removeprefix('time/')} {spent / total:.0%}  ", PHASES[name])
    return Text.assemble(bar, "\n", legend)


def _end(text: str) -> str:
    """The end of a long text, where the question and the answer are."""
    text = text.strip()
    return text if len(text) <= SAMPLE_CHARACTERS else "… " + text[-SAMPLE_CHARACTERS:]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _open_live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=stream), auto_refresh=False)
    live.start()
    return live
