"""Write GSM8K's short problems as rows with `prompt`, `completion` and `answer`, some of them held out.

python examples/gsm8k/prepare.py
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastrl.data.readers import Row, read_rows

BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
PUBLIC_FILE = "https://github.com/openai/grade-school-math, file grade_school_math/data/train.jsonl"

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def prepared(row: Row) -> Row:
    """One problem in our columns; the completion is the solution without its calculator marks.

    "48/2 = <<48/2=24>>24" becomes "48/2 = 24": a mark is the call of a calculator that nobody answers here.
    `answer` is the text after "####".
    """
    solution = _CALCULATOR_MARK.sub("", row["answer"])
    return {"prompt": row["question"], "completion": solution, "answer": solution.rpartition("####")[2].strip()}


def split(rows: Iterable[Row], *, max_characters: int, n_held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffle the problems of at most `max_characters` (prompt and completion) into training and held-out rows.

    Rows with the same prompt would be in both; the later one is left out.
    """
    by_prompt: dict[str, Row] = {}
    for row in rows:
        if len(row["prompt"]) + len(row["completion"]) <= max_characters:
            by_prompt.setdefault(row["prompt"], row)
    short = list(by_prompt.values())
    random.Random(seed).shuffle(short)
    return short[n_held_out:], short[:n_held_out]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default=str(BESIDE_THE_CHECKOUT), help="folder with GSM8K's train.jsonl")
    parser.add_argument("--output_dir", default="runs/gsm8k")
    parser.add_argument("--max_rows", type=int, help="read only the first rows of the file")
    parser.add_argument("--max_characters", type=int, default=500, help="of prompt and completion together")
    parser.add_argument("--n_held_out", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    options = parser.parse_args(arguments)

    source = Path(options.data) / "train.jsonl"
    if not source.is_file():
        sys.exit(f"GSM8K is not at {source}; download {PUBLIC_FILE} (MIT licence), and pass its folder as --data")
    rows = read_rows(source, max_rows=options.max_rows)
    train, held_out = split(
        map(prepared, rows), max_characters=options.max_characters, n_held_out=options.n_held_out, seed=options.seed
    )
    if not train:
        sys.exit(f"only {len(held_out)} problems are short enough: lower --n_held_out or raise --max_characters")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    print(f"{folder}: {len(train)} problems to train on, {len(held_out)} held out, of {len(rows)} in {source.name}")


if __name__ == "__main__":
    main()
