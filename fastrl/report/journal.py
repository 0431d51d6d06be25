"""Everything a run writes while it goes, as one owner: metrics, completions, errors, the panel and the trackers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from fastrl.report.completions import CompletionSample, CompletionsLog
from fastrl.report.history import History
from fastrl.report.html import write_report
from fastrl.report.log import (
    COMPLETIONS_FILE,
    ERRORS_FILE,
    METRICS_FILE,
    SIGNALS_FILE,
    JsonLines,
    MetricsLog,
    log_errors,
    read_log,
)
from fastrl.report.panel import Panel
from fastrl.report.signals import DETECTORS, Signal
from fastrl.report.trackers import open_tracker
from fastrl.rewards.score import RewardError


class Journal:
    """Owns a run's log files; opening one on a directory with logs continues them.

    Args:
        run_dir: the run directory.
        title: what the panel is headed with.
        total_steps: steps of the whole run.
        live: draw the panel on a terminal.
        trackers: names for `open_tracker`.
        config: stored by the trackers.
        is_silent: write, show and remember nothing: for every rank of a run but the first.

    Attributes:
        history: curves of the metrics written so far, for detectors.
        last_signals: detector -> step at which it last fired.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        title: str,
        total_steps: int,
        live: bool,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any],
        is_silent: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self._is_silent = is_silent
        self.history = History()
        self.last_signals: dict[str, int] = {}
        if is_silent:
            return
        self._metrics = MetricsLog(run_dir / METRICS_FILE)
        self._completions = CompletionsLog(run_dir / COMPLETIONS_FILE)
        self._errors = JsonLines(run_dir / ERRORS_FILE)
        self._signals = JsonLines(run_dir / SIGNALS_FILE)
        self._trackers = [open_tracker(name, run_dir, config) for name in trackers]
        self._shown_errors: set[str] = set()
        self._panel = Panel(title, total_steps=total_steps, live=live)

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        samples: Sequence[CompletionSample] = (),
        *,
        is_shown: bool = True,
    ) -> None:
        """Log one step: always to metrics.jsonl, and everywhere else when it is shown."""
        if self._is_silent:
            return
        self._metrics.write(step, metrics)
        self.history.add(step, metrics)
        if not is_shown:
            return
        if samples:
            self._completions.write(step, samples)
        for log in self._trackers:
            log(step, metrics)
        self._panel.update(step, metrics, samples[0] if samples else None)

    def write_errors(self, step: int, errors: Mapping[str, RewardError]) -> None:
        """Log the failures of a step's rewards; the first of each reward goes to standard error too."""
        if self._is_silent:
            return
        log_errors(self._errors, step, errors)
        for name, error in errors.items():
            if name not in self._shown_errors:
                self._shown_errors.add(name)
                print(
                    f"step {step}: reward {name!r} failed on {error.count} completions, which train nothing; further "
                    f"failures go to {self.run_dir / ERRORS_FILE}. The first:\n{error.first}",
                    file=sys.stderr,
                )

    def write_signal(self, signal: Signal, action: str) -> None:
        """Log a detector that fired and what was done about it; it goes to standard error too."""
        if self._is_silent:
            return
        self._signals.append(asdict(signal) | {"action": action})
        self.last_signals[signal.name] = signal.step
        causes = "; ".join(DETECTORS[signal.name].causes)
        print(
            f"step {signal.step}: {signal.name}: {signal.text}. Action: {action}. Possible causes: {causes}.",
            file=sys.stderr,
        )

    def offsets(self) -> dict[str, int]:
        """Return the lengths of the files, for a checkpoint; what they count is on the disk."""
        if self._is_silent:
            return {}
        return {
            METRICS_FILE: self._metrics.offset,
            COMPLETIONS_FILE: self._completions.offset,
            ERRORS_FILE: self._errors.offset,
            SIGNALS_FILE: self._signals.offset,
        }

    def truncate_to(self, offsets: Mapping[str, int]) -> None:
        """Forget what was logged after a checkpoint, so that a resumed run writes it again; no offset forgets all."""
        if self._is_silent:
            return
        self._metrics.truncate_to(offsets.get(METRICS_FILE, 0))
        self._completions.truncate_to(offsets.get(COMPLETIONS_FILE, 0))
        self._errors.truncate_to(offsets.get(ERRORS_FILE, 0))
        self._signals.truncate_to(offsets.get(SIGNALS_FILE, 0))
        self.history = History()
        for line in read_log(self.run_dir / METRICS_FILE):
            self.history.add(line["step"], {name: x for name, x in line.items() if name not in ("step", "time")})
        self.last_signals = {line["name"]: line["step"] for line in read_log(self.run_dir / SIGNALS_FILE)}

    def close(self) -> None:
        """Close the files, give the terminal back and, when a step was logged, write the HTML report."""
        if self._is_silent:
            return
        self._panel.close()
        for file in (self._metrics, self._completions, self._errors, self._signals):
            file.close()
        if (self.run_dir / METRICS_FILE).stat().st_size > 0:
            write_report(self.run_dir)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
