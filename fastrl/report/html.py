"""One self-contained HTML file per run: curves, time split, samples, errors, configuration, environment.

A model, a dataset or a user wrote everything in it, so everything is escaped, nothing is fetched, and a content policy
forbids scripts altogether.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastrl.report.completions import CompletionSample, read_completions, shown_text, visible
from fastrl.report.curves import Point, short_number, svg_curve
from fastrl.report.log import (
    COMPLETIONS_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    ERRORS_FILE,
    METRICS_FILE,
    SIGNALS_FILE,
    read_log,
)
from fastrl.report.panel import PHASES
from fastrl.report.signals import DETECTORS
from fastrl.report.style import STYLE

REPORT_FILE = "report.html"
MOST_SAMPLES = 120
MOST_CHARACTERS = 20_000  # of one text
MOST_ERRORS = 50

# Section -> the metrics it starts with, in this order, and the prefixes it collects after them.
_SECTIONS: Mapping[str, tuple[Sequence[str], tuple[str, ...]]] = {
    "Learning": (
        ("reward", "loss", "kl", "entropy", "reward_std", "frac_reward_zero_std", "grad_norm", "learning_rate"),
        ("eval/", "rewards/", "accuracy", "mean_token_accuracy", "logps/", "margin"),
    ),
    "Completions": (("completions/mean_length", "completions/clipped_ratio"), ("completions/",)),
    "Stability": ((), ("clip_ratio/", "sampling/", "ratio", "advantage")),
    "Speed": (("tokens_per_second", "mfu", "memory/peak_gib", "step_time"), ("time/", "memory/")),
    "More": ((), ("",)),
}
_NOT_PLOTTED = ("step", "time", "nonfinite", "num_tokens")


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run directory from the files that are there.

    Returns:
        Its path. An older report is replaced at once, never half.

    Raises:
        ValueError: there is no metrics.jsonl, or it is empty.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).is_file():
        raise ValueError(f"{run_dir} has no {METRICS_FILE}; a report is made from the directory of a run")
    log = read_log(run_dir / METRICS_FILE)
    if not log:
        raise ValueError(f"{run_dir / METRICS_FILE} is empty: the run has not logged a step yet")
    curves = metric_curves(log)
    completions = run_dir / COMPLETIONS_FILE
    errors, signals = run_dir / ERRORS_FILE, run_dir / SIGNALS_FILE
    page = "\n".join(
        [
            _head(run_dir.resolve().name, log, curves),
            *_curve_sections(curves),
            _time_split(curves),
            _samples(read_completions(completions) if completions.is_file() else []),
            _signals(read_log(signals) if signals.is_file() else []),
            _errors(read_log(errors) if errors.is_file() else []),
            _text_section("Configuration", run_dir / CONFIG_FILE),
            _text_section("Environment", run_dir / ENVIRONMENT_FILE),
            "</main></body></html>\n",
        ]
    )
    path = run_dir / REPORT_FILE
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def metric_curves(log: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """name -> (step, value) of every number in the log, in order; nulls are left out."""
    curves: dict[str, list[Point]] = {}
    for line in log:
        for name, value in line.items():
            if name not in _NOT_PLOTTED and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def _head(name: str, log: Sequence[Mapping[str, Any]], curves: Mapping[str, list[Point]]) -> str:
    tiles = [("steps", short_number(log[-1]["step"]))]
    for metric in ("reward", "eval/reward", "rewards/accuracies", "loss"):
        if metric in curves:
            first, last = curves[metric][0][1], curves[metric][-1][1]
            tiles.append((f"{metric}, from {short_number(first)}", short_number(last)))
    if "tokens_per_second" in curves:
        speeds = sorted(value for _, value in curves["tokens_per_second"])
        tiles.append(("tokens/s, median", short_number(speeds[len(speeds) // 2])))
    tiles.append(("logged over", _duration(log[-1]["time"] - log[0]["time"])))
    lost = sum(line.get("nonfinite", 0) for line in log)
    if lost:
        tiles.append(("non-finite values", str(lost)))
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in tiles
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(visible(name))}</title><style>\n{STYLE}</style></head><body><main>"
        f'<header><p>fastrl run</p><h1>{escape(visible(name))}</h1><div class="tiles">{shown}</div></header>'
    )


def _curve_sections(curves: Mapping[str, list[Point]]) -> list[str]:
    left = dict(curves)
    sections = []
    for title, (first, prefixes) in _SECTIONS.items():
        names = [name for name in first if name in left]
        names += sorted(name for name in left if name.startswith(prefixes) and name not in names)
        figures = "".join(_figure(name, left.pop(name)) for name in names)
        if figures:
            sections.append(f'<section><h2>{title}</h2><div class="curves">{figures}</div></section>')
    return sections


def _figure(name: str, points: list[Point]) -> str:
    title, last = visible(name), short_number(points[-1][1])
    caption = f"<figcaption>{escape(title)}<b>{last}</b></figcaption>"
    return f"<figure>{caption}{svg_curve(points, title=title)}</figure>"


def _time_split(curves: Mapping[str, list[Point]]) -> str:
    seconds = {name: math.fsum(value for _, value in curves.get(name, [])) for name in PHASES}
    total = math.fsum(seconds.values())
    if not total:
        return ""
    bar, legend = [], []
    for place, (name, spent) in enumerate(seconds.items()):
        if spent:
            share, label = spent / total, name.removeprefix("time/")
            bar.append(f'<i class="phase{place}" style="flex-grow:{share:.4f}"></i>')
            legend.append(f'<span><i class="phase{place}"></i>{label} {share:.0%} ({_duration(spent)})</span>')
    return (
        f'<section><h2>Where the time went</h2><div class="split">{"".join(bar)}</div>'
        f'<div class="legend">{"".join(legend)}</div></section>'
    )


def _samples(completions: Sequence[tuple[int, CompletionSample]]) -> str:
    if not completions:
        return ""
    count = min(MOST_SAMPLES, len(completions))
    # Spread over the run, its last sample included, newest first.
    kept = [completions[(index + 1) * len(completions) // count - 1] for index in reversed(range(count))]
    shown = "".join(_sample(step, sample, is_open=place == 0) for place, (step, sample) in enumerate(kept))
    note = f"{count} of {len(completions)} samples, newest first" if count < len(completions) else "newest first"
    return f'<section><h2>Completions</h2><p class="note">{note}</p>{shown}</section>'


def _sample(step: int, sample: CompletionSample, *, is_open: bool) -> str:
    reward = "left out" if sample.reward is None else f"reward {short_number(sample.reward)}"
    completion = _cut(shown_text(sample.completion))
    beginning = " ".join(completion[:200].split())[:90]
    facts = [(name, "-" if value is None else short_number(value)) for name, value in sample.rewards.items()]
    if sample.advantage is not None:
        facts.append(("advantage", short_number(sample.advantage)))
    facts += [(name, _cut(shown_text(value))) for name, value in sample.extra.items()]
    chips = "".join(f"<span>{escape(visible(name))} <b>{escape(value)}</b></span>" for name, value in facts)
    return (
        f'<details{" open" if is_open else ""}><summary><span class="step">step {step:,}</span>'
        f'<span class="reward">{reward}</span><span class="beginning">{escape(beginning)}</span></summary>'
        f'<div class="chips">{chips}</div><h3>prompt</h3><pre>{escape(_cut(shown_text(sample.prompt)))}</pre>'
        f"<h3>completion</h3><pre>{escape(completion)}</pre></details>"
    )


def _signals(signals: Sequence[Mapping[str, Any]]) -> str:
    if not signals:
        return ""
    shown = "".join(
        f'<details><summary><span class="step">step {signal["step"]:,}</span>'
        f'<span class="reward">{escape(signal["name"])}</span>'
        f'<span class="beginning">{escape(visible(signal["text"]))}; {escape(signal["action"])}</span></summary>'
        f"<pre>{escape(chr(10).join(DETECTORS[signal['name']].causes))}</pre></details>"
        for signal in signals[-MOST_ERRORS:]
    )
    note = "what detectors saw, with possible causes; a reason to read completions, no proof"
    return f'<section class="errors"><h2>Signals</h2><p class="note">{note}</p>{shown}</section>'


def _errors(errors: Sequence[Mapping[str, Any]]) -> str:
    if not errors:
        return ""
    counts: dict[str, int] = {}
    for error in errors:
        counts[error["reward"]] = counts.get(error["reward"], 0) + error["count"]
    totals = ", ".join(f"{name}: {count}" for name, count in counts.items())
    shown = "".join(
        f'<details><summary><span class="step">step {error["step"]:,}</span>'
        f'<span class="reward">{escape(visible(error["reward"]))}</span>'
        f'<span class="beginning">{error["count"]:,} completions</span></summary>'
        f"<pre>{escape(_cut(visible(error['message'])))}</pre></details>"
        for error in errors[:MOST_ERRORS]
    )
    note = f"completions left out, by reward: {totals}"
    return f'<section class="errors"><h2>Reward errors</h2><p class="note">{escape(visible(note))}</p>{shown}</section>'


def _text_section(title: str, path: Path) -> str:
    if not path.is_file():
        return ""
    text = escape(visible(path.read_text(encoding="utf-8", errors="replace")))
    return f"<section><h2>{title}</h2><details><summary>{path.name}</summary><pre>{text}</pre></details></section>"


def _cut(text: str) -> str:
    left_over = len(text) - MOST_CHARACTERS
    return text if left_over <= 0 else f"{text[:MOST_CHARACTERS]}\n… {left_over:,} more characters"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
