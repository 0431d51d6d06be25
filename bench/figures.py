"""Tables and figures from what was measured: `python -m bench.figures [--check]` rewrites every one of them.

Reads the JSON lines of bench/results/ and writes between the `<!-- results:KIND -->` markers of README.md,
docs/benchmarks.md and docs/plan.md, docs/results_KIND.svg for KIND cpu and cuda, and docs/curves.svg. A number links to
the line it comes from. For each row and shape, what fastrl runs by default stands against the fastest other contender;
rows that lose are there too. KIND prediction is the cost model beside the measurement, KIND curves the fitted slopes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log10
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "bench/results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/plan.md")
README_ROWS = (
    *("linear_token_loss", "linear_logprob", "linear_cross_entropy"),
    *("training_step", "supervised_step", "grpo_step", "trl_step"),
)
KINDS = {"cpu": "A CPU", "cuda": "A GPU"}
# What the ops choose by themselves, best first, and what other programs call their own side. The rest is a rival, but
# for ablations and forms of ours that nobody gets by default.
_NAMES = ("fastrl", "with fastrl", "fastrl's trainer, packed", "trl, patched")
OURS = {"cpu": (*_NAMES, "native", "torch"), "cuda": (*_NAMES, "triton", "torch")}
FORMS = ("linear_logprob", "torch, ", "no packing", "eager head", "no skipping", "no sharing", "TRL, ", "trl, patched")
WIDTH, LINE, LEFT, RIGHT = 760, 18, 330, 60


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a results file.

    Attributes:
        file: below the repository's root.
        line: counted from 1.
        values: as written.
    """

    file: str
    line: int
    values: dict[str, Any]

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Records of one place were measured against each other."""
        return self.file, self.values["row"], self.values["shape"]["name"], self.values.get("threads", 0)

    @property
    def link(self) -> str:
        """To this line, from the root."""
        return f"{self.file}#L{self.line}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours and the fastest other contender on one row and shape."""

    row: str
    shape: str
    threads: int
    ours: Record
    other: Record

    @property
    def ratio(self) -> float:
        """The other's time over ours: above 1 we are faster."""
        return float(self.other.values["ms"] / self.ours.values["ms"])


def read(root: Path = ROOT) -> list[Record]:
    """Every record of a row, in the order of files and lines; other programs keep their records there too."""
    found = []
    for path in sorted((root / RESULTS).glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            values = json.loads(line) if line.strip() else {}
            if "row" in values:
                found.append(Record(f"{RESULTS}/{path.name}", number, values))
    return found


def comparisons(records: Iterable[Record], kind: str) -> list[Comparison]:
    """Rows and shapes of one kind of machine where somebody else was timed beside us."""
    mine = [record for record in records if f".{kind}." in record.file and "ms" in record.values]
    found = []
    for (_, row, shape, threads), group in groupby(sorted(mine, key=lambda each: each.place), key=lambda x: x.place):
        side = {record.values["contender"]: record for record in group}
        ours = next((side[name] for name in OURS[kind] if name in side), None)
        others = [record for name, record in side.items() if is_rival(name, kind)]
        if ours is not None and others:
            best = min(others, key=lambda record: float(record.values["ms"]))
            found.append(Comparison(row, shape, threads, ours, best))
    return found


def is_rival(contender: str, kind: str) -> bool:
    """Whether a contender is somebody else's, or what a user would write without us."""
    return contender not in OURS[kind] and not contender.startswith(FORMS)


def table(found: Sequence[Comparison], *, prefix: str) -> str:
    """The comparisons as Markdown.

    Args:
        prefix: from the page's folder to the root.
    """
    lines = ["| row | shape | fastrl | fastest other | | times faster | peak memory |", "|" + " --- |" * 7]
    for each in found:
        ours, other = (f"[{_ms(record)}]({prefix}{record.link})" for record in (each.ours, each.other))
        faster = f"**{each.ratio:.2f}**" if each.ratio >= 1 else f"{each.ratio:.2f}"
        memory = f"{_mib(each.ours)} / {_mib(each.other)}"
        threads = f", {each.threads} threads" if each.threads > 1 else ""
        name = each.other.values["contender"]
        lines.append(f"| {each.row} | {each.shape}{threads} | {ours} | {name} | {other} | {faster} | {memory} |")
    return "\n".join(lines)


def caption(found: Sequence[Comparison]) -> str:
    """Where and when the table's numbers were measured, in one sentence."""
    values = [record.values for each in found for record in (each.ours, each.other)]
    devices = sorted({str(each["device"]) for each in values})
    commits = sorted({str(each["commit"])[:7] for each in values})
    won = sum(each.ratio >= 1 for each in found)
    return (
        f"{', '.join(devices)}; medians in milliseconds, memory in MiB above the inputs; commits "
        f"{', '.join(commits)}. fastrl is faster in {won} of {len(found)} rows; each number links to its record."
    )


def figure(found: Sequence[Comparison], title: str) -> str:
    """Bars of the ratios on a logarithmic axis, losses to the left."""
    ratios = [each.ratio for each in found]
    low, high = min([0.5, *ratios]), max([2.0, *ratios])
    height = 60 + LINE * len(found)

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (log10(ratio) - log10(low)) / (log10(high) - log10(low))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-size="14">{_escaped(title)}</text>',
    ]
    for place, each in enumerate(found):
        y = 40 + LINE * place
        left, right = sorted((x(1.0), x(each.ratio)))
        colour = "#1b7f79" if each.ratio >= 1 else "#b3541e"
        name = f"{each.row}, {each.shape}: against {each.other.values['contender']}"
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 10}" text-anchor="end">{_escaped(_short(name))}</text>',
            f'<rect x="{left:.1f}" y="{y}" width="{max(1.0, right - left):.1f}" height="{LINE - 5}" fill="{colour}"/>',
            f'<text x="{right + 4:.1f}" y="{y + 10}">{each.ratio:.2f}</text>',
        ]
    axis = f'<line x1="{x(1.0):.1f}" y1="32" x2="{x(1.0):.1f}" y2="{height - 20}" stroke="#222"/>'
    return "\n".join([*parts, axis, "</svg>", ""])


def predictions(records: Iterable[Record], *, prefix: str) -> str:
    """The cost model's step time and peak memory beside the measured ones, for every record that has them."""
    head = "| machine | step | predicted ms | measured ms | measured / predicted "
    lines = [head + "| predicted MiB | measured MiB | measured / predicted |", "|" + " --- |" * 8]
    for record in records:
        predicted = record.values.get("predicted_ms")
        if predicted is not None:
            ratio = float(record.values["ms"]) / float(predicted)
            measured = f"[{_ms(record)}]({prefix}{record.link})"
            shape = record.values["shape"]["name"]
            line = f"| {record.values['device']} | {shape} | {predicted:.0f} | {measured} | {ratio:.2f} "
            memory = "- | - | -"
            if "predicted_peak_gib" in record.values:
                made, peak = (float(record.values[name]) for name in ("predicted_peak_gib", "peak_gib"))
                memory = f"{1024 * made:.1f} | {1024 * peak:.1f} | {peak / made:.2f}"
            lines.append(f"{line}| {memory} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def slopes(records: Iterable[Record], *, prefix: str) -> str:
    """Fitted exponents of the curves."""
    lines = ["| size that grows | | from | to | time grows as | memory grows as |", "|" + " --- |" * 6]
    for record in records:
        if record.values["row"] == "curve":
            values = record.values
            ends = f"{values['sizes'][0]:.0f} | {values['sizes'][-1]:.0f}"
            time_ = f"[size^{values['slope']:.2f}]({prefix}{record.link})"
            name = f"{values['axis']} | {values['contender']}"
            lines.append(f"| {name} | {ends} | {time_} | size^{values['memory_slope']:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def curves(records: Iterable[Record]) -> str:
    """Time over size, both logarithmic, one small panel for each axis; eager dashed."""
    panels: dict[str, list[Record]] = {}
    for record in records:
        if record.values["row"] == "curve":
            panels.setdefault(record.values["axis"], []).append(record)
    side, gap = 130, 22
    width = gap + (side + gap) * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {side + 70}" font-family="sans-serif" '
        f'font-size="10"><rect width="{width}" height="{side + 70}" fill="white"/>'
    ]
    for place, (axis, found) in enumerate(panels.items()):
        left, top = gap + place * (side + gap), 30
        sizes = [size for each in found for size in each.values["sizes"]]
        times = [ms for each in found for ms in each.values["times_ms"]]
        parts.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#aaa"/>')
        parts.append(f'<text x="{left}" y="{top - 8}" font-size="12">{_escaped(axis)}</text>')
        ends = f"{min(sizes):.0f} to {max(sizes):.0f}: {min(times):.1f} to {max(times):.1f} ms"
        parts.append(f'<text x="{left}" y="{top + side + 14}">{ends}</text>')
        for each in found:
            points = " ".join(
                f"{left + side * _share(size, sizes):.1f},{top + side * (1 - _share(ms, times)):.1f}"
                for size, ms in zip(each.values["sizes"], each.values["times_ms"], strict=True)
            )
            is_ours = each.values["contender"] == "fastrl"
            style = 'stroke="#1b7f79"' if is_ours else 'stroke="#b3541e" stroke-dasharray="4 3"'
            parts.append(f'<polyline points="{points}" fill="none" stroke-width="2" {style}/>')
            label = f"{each.values['contender']}: size^{each.values['slope']:.2f}"
            parts.append(f'<text x="{left}" y="{top + side + (26 if is_ours else 38)}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def rewritten(page: str, kind: str, block: str) -> str:
    """The page with the block between its markers; a page without markers stays as it is."""
    pattern = re.compile(rf"(<!-- results:{kind} -->\n).*?(<!-- /results:{kind} -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{block}\n{match[2]}", page)


def outputs(root: Path = ROOT) -> dict[Path, str]:
    """Every file that the results determine, with its text."""
    records = read(root)
    pages = {root / name: (root / name).read_text() for name in PAGES}
    files: dict[Path, str] = {}
    for kind, machine in KINDS.items():
        found = comparisons(records, kind)
        for path, text in pages.items():
            is_readme = path.parent == root
            shown = [each for each in found if each.row in README_ROWS and each.threads == 1] if is_readme else found
            block = "Not measured."
            if shown:
                block = f"{caption(shown)}\n\n{table(shown, prefix='' if is_readme else '../')}"
            pages[path] = rewritten(text, kind, block)
        if found:
            files[root / f"docs/results_{kind}.svg"] = figure(found, f"{machine}: times faster than the fastest other")
    for path, text in pages.items():
        prefix = "" if path.parent == root else "../"
        with_predictions = rewritten(text, "prediction", predictions(records, prefix=prefix))
        pages[path] = rewritten(with_predictions, "curves", slopes(records, prefix=prefix))
    if any(record.values["row"] == "curve" for record in records):
        files[root / "docs/curves.svg"] = curves(records)
    return {**pages, **files}


def main() -> int:
    """Write the files, or with --check say which are out of date.

    Returns:
        0, or 1 when --check finds one.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    options = parser.parse_args()
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(outputs()[path])
    return 1 if options.check and stale else 0


def _ms(record: Record) -> str:
    ms = float(record.values["ms"])
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _mib(record: Record) -> str:
    if record.values.get("peak_gib") is not None:
        size = 1024 * float(record.values["peak_gib"])
    elif record.values.get("peak_mib") is not None:
        size = float(record.values["peak_mib"])
    else:
        return "-"
    return f"{size:.1f}" if size < 100 else f"{size:.0f}"


def _share(value: float, of: Sequence[float]) -> float:
    """Place between the least and the largest on a logarithmic axis, in [0, 1]."""
    low, high = log10(min(of)), log10(max(of))
    return (log10(value) - low) / (high - low) if high > low else 0.5


def _short(name: str) -> str:
    return name if len(name) <= 58 else name[:57] + "…"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    sys.exit(main())
