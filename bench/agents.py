"""What the tiny agents learn: `python -m bench.agents run --seeds 1 2 3 4 5`, then `python -m bench.agents show`.

`run` takes examples/tiny/agent.yaml and agent_search.yaml from random weights (other ones with each seed) through the
warm start and GRPO to the last evaluation, in a process with one thread whose processor time is counted; with
`--without_tools` GRPO and the evaluations have none. `show` prints the table and writes docs/agents.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from bench.__main__ import ROOT, provenance
from bench.records import read, write
from fastrl.recipes.agent_tasks import make_base_model

EXAMPLES = ROOT.parent / "examples" / "tiny"
RESULTS = ROOT / "results" / "agents.cpu.jsonl"
FIGURE = ROOT.parent / "docs" / "agents.svg"
NAMES = {"agent": "calculator", "agent_search": "search, two lookups"}
COLOURS = {"agent": "#1b7f79", "agent_search": "#b3541e"}


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    Attributes:
        task: the example.
        seed: of weights, data order and every sample.
        has_tools: whether GRPO and the evaluations had them.
        before: success on held-out questions after the warm start.
        after: the same after GRPO.
        curve: [steps] success of the episodes that each step learns from.
        seconds: of one processor, from random weights to the last evaluation.
    """

    task: str
    seed: int
    has_tools: bool
    before: float
    after: float
    curve: list[float]
    seconds: float


def measured(task: str, seed: int, *, has_tools: bool) -> Result:
    """Run an example in a folder of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_base_model(folder / "base", seed=seed)
        record = yaml.safe_load((EXAMPLES / f"{task}.yaml").read_text())
        for stage in record["stages"].values():
            stage["seed"] = seed
            if not has_tools:
                stage.pop("environment", None)
        record["stages"]["sft"]["model_name_or_path"] = "base"
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "fastrl", "run", "pipeline.yaml"]
        subprocess.run(command, cwd=folder, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        output = folder / record["output_dir"]
        lines = [json.loads(line) for line in (output / "grpo" / "metrics.jsonl").read_text().splitlines()]
        return Result(
            task,
            seed,
            has_tools,
            before=_success(output / "before"),
            after=_success(output / "after"),
            curve=[line["reward"] for line in lines if "reward" in line],
            seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        )


def _success(folder: Path) -> float:
    return float(json.loads((folder / "eval.json").read_text())["exact_match"]["mean"])


def table(results: list[Result]) -> Iterator[str]:
    """The runs as Markdown, a line at a time; the median of the seeds last."""
    yield "| task | seed | after the warm start | after GRPO | seconds of one processor |"
    yield "| --- | --- | --- | --- | --- |"
    for (task, has_tools), group in _grouped(results).items():
        name = NAMES[task] if has_tools else f"{NAMES[task]}, without the tool"
        for each in group:
            yield f"| {name} | {each.seed} | {each.before:.1%} | {each.after:.1%} | {each.seconds:.0f} |"
        if len(group) > 1:
            before, after = median(each.before for each in group), median(each.after for each in group)
            seconds = median(each.seconds for each in group)
            yield f"| **{name}** | median | **{before:.1%}** | **{after:.1%}** | **{seconds:.0f}** |"


def _grouped(results: list[Result]) -> dict[tuple[str, bool], list[Result]]:
    groups: dict[tuple[str, bool], list[Result]] = {}
    for each in sorted(results, key=lambda each: (not each.has_tools, each.task, each.seed)):
        groups.setdefault((each.task, each.has_tools), []).append(each)
    return groups


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 60, 20, 48, 48


def figure(results: list[Result]) -> str:
    """Success by step as SVG: thin lines are seeds, a thick one the median of a task, dashes the runs without tools."""
    steps = max(len(each.curve) for each in results)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, "Success of sampled episodes by step of GRPO, five seeds", size=15),
    ]
    for tenth in range(0, 11, 2):
        parts.append(_line([(0, tenth / 10), (steps, tenth / 10)], steps, "#ddd"))
        parts.append(_text(LEFT - 8, _y(tenth / 10) + 4, f"{10 * tenth} %", anchor="end"))
    for step in range(0, steps + 1, 10):
        parts.append(_text(_x(step, steps), HEIGHT - BOTTOM + 18, str(step), anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "step of GRPO", anchor="middle"))
    for (task, has_tools), group in _grouped(results).items():
        colour = COLOURS[task]
        for each in group:
            points = [(step, value) for step, value in enumerate(each.curve, 1)]
            parts.append(_line(points, steps, colour, 0.7, dashes="" if has_tools else "2 4", opacity=0.6))
        if has_tools:
            middle = [median(values) for values in zip(*(each.curve for each in group), strict=True)]
            parts.append(_line(list(enumerate(middle, 1)), steps, colour, 2.5))
    for place, task in enumerate(NAMES):
        parts.append(_text(WIDTH - RIGHT - 8, _y(0.28) + 20 * place, NAMES[task], anchor="end", fill=COLOURS[task]))
    parts.append(_text(WIDTH - RIGHT - 8, _y(0.03), "dotted: the same without the tool", anchor="end", fill="#555"))
    return "\n".join([*parts, "</svg>", ""])


def _x(step: float, steps: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / steps


def _y(success: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * success


def _line(
    points: Sequence[tuple[float, float]],
    steps: int,
    colour: str,
    width: float = 1,
    *,
    dashes: str = "",
    opacity: float = 1,
) -> str:
    path = " ".join(f"{_x(x, steps):.1f},{_y(y):.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    style = f'fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"'
    return f'<polyline points="{path}" {style}{dashed}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#222", size: int = 13) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}"'
    return f'<text {place} stroke="white" stroke-width="3" paint-order="stroke">{text}</text>'


def recorded() -> list[Result]:
    """What was measured, without where."""
    return [Result(**{key: value for key, value in each.items() if key != "provenance"}) for each in read(RESULTS)]


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["task"], record["seed"], record["has_tools"]


def main() -> None:
    """Measure, one record per run, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("--tasks", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--without_tools", action="store_true", help="the control: GRPO and evaluations have no tool")
    options = parser.parse_args()
    if options.action == "run":
        for task in options.tasks:
            for seed in options.seeds:
                result = measured(task, seed, has_tools=not options.without_tools)
                found = {"task": task, "seed": seed, "has_tools": result.has_tools, "before": result.before}
                found |= {"after": result.after, "curve": [round(each, 4) for each in result.curve]}
                found |= {"seconds": round(result.seconds, 1), "provenance": provenance("cpu", quick=False)}
                write(RESULTS, [*(each for each in read(RESULTS) if _key(each) != _key(found)), found])
    print("\n".join(table(recorded())))
    if options.action == "show":
        FIGURE.write_text(figure(recorded()))


if __name__ == "__main__":
    main()
