"""Print what the two stages of the example brought, and what they did not.

python examples/gsm8k/summary.py
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

STAGES = {"after SFT": "eval-sft", "after GRPO": "eval-grpo"}
MEANING = {
    "numeric": "right number",
    "answer_line": 'ends with "#### number"',
    "true_equations": "equations that hold",
}

CANNOT = """\
What this model cannot do: grade-school mathematics. It has a million parameters and read four thousand solutions for
three epochs; it writes in the manner of a solution, and its numbers have little to do with the question. Compare its
share of right numbers with the constant guess, not with zero: GRPO amplifies what a model sometimes gets right, and
chance is all there is to amplify. What rises is the form, in the cheapest way there is: by writing less.
"""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run."""
    return [(line["step"], line[name]) for line in read_lines(path / "metrics.jsonl") if name in line]


def ends(label: str, points: Sequence[tuple[int, float]]) -> str:
    """A curve in one line: its first and its last point."""
    (first, start), (last, end) = points[0], points[-1]
    return f"  {label:<28}{start:7.3f} (step {first})  ->  {end:.3f} (step {last})"


def constant_guess(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> tuple[str, float, float]:
    """The most frequent training answer, how often it is right on held-out problems, and that share's error.

    standard_error = sqrt(share (1 - share) / n)
    """
    guess = Counter(row["answer"] for row in train).most_common(1)[0][0]
    share = sum(row["answer"] == guess for row in held_out) / len(held_out)
    return guess, share, sqrt(share * (1 - share) / len(held_out))


def table(stages: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """One line per reward: each stage's mean with its standard error in per cent, and the change between them.

    A reward that judged no completion of a stage has no line.
    """
    lines = [f"  {'':<28}" + "".join(f"{name:<18}" for name in stages) + "change"]
    for reward, meaning in MEANING.items():
        if any(reward not in stage for stage in stages.values()):
            continue
        cells = [stage[reward] for stage in stages.values()]
        change = cells[-1]["mean"] - cells[0]["mean"]
        error = sqrt(cells[0]["standard_error"] ** 2 + cells[-1]["standard_error"] ** 2)
        shown = "".join(f"{_percent(cell['mean'], cell['standard_error']):<18}" for cell in cells)
        lines.append(f"  {meaning:<28}{shown}{_percent(change, error, sign='+')}")
    return lines


def _percent(value: float, error: float, *, sign: str = "-") -> str:
    return f"{100 * value:{sign}.1f} +- {100 * error:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the run's files and print the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", default="runs/gsm8k", help="folder that run.sh filled")
    folder = Path(parser.parse_args(arguments).run)

    train, held_out = read_lines(folder / "train.jsonl"), read_lines(folder / "held_out.jsonl")
    stages = {name: json.loads((folder / place / "eval.json").read_text()) for name, place in STAGES.items()}
    print("\nTraining")
    print(ends("SFT loss", curve(folder / "sft", "loss")))
    print(ends("SFT loss, held out", curve(folder / "sft", "eval/loss")))
    print(ends("GRPO reward", curve(folder / "grpo", "reward")))
    print(ends("GRPO tokens per completion", curve(folder / "grpo", "completions/mean_length")))
    print(f"\n{len(held_out)} held-out problems, sampled at temperature 1, +- one standard error")
    print("\n".join(table(stages)))
    guess, share, error = constant_guess(train, held_out)
    print(f"  {'always answering ' + guess:<28}{_percent(share, error)}")
    print(f"\n{CANNOT}")


if __name__ == "__main__":
    main()
