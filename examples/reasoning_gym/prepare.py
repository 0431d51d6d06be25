"""Write problems of one reasoning-gym task as rows with `prompt`, `completion`, and what the task's verifier needs.

python examples/reasoning_gym/prepare.py
python examples/reasoning_gym/prepare.py --task gcd --config '{"max_value": 50}'
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastrl.rewards import reasoning_gym_rows

ONE_ANIMAL = {"min_animals": 1, "max_animals": 1}


def split_rows(
    task: str, *, n_train: int, n_held_out: int, config: Mapping[str, object]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training and held-out rows of a task, without a prompt in common; held-out prompts are all different.

    The completion, for the supervised stage, is the task's own answer.

    Raises:
        ValueError: reasoning-gym refuses the task or its configuration, or has too few different prompts.
        RuntimeError: reasoning-gym is not installed.
    """
    rows = reasoning_gym_rows(task, size=n_train + n_held_out, seed=0, config=config)
    for row in rows:
        row["completion"] = row["answer"]
    different = {row["prompt"]: row for row in rows}
    held_out = list(different.values())[:n_held_out]
    taken = {row["prompt"] for row in held_out}
    train = [row for row in rows if row["prompt"] not in taken]
    if not train:
        raise ValueError(f"{task} has only {len(different)} different prompts; lower n_held_out, or widen its config")
    return train, held_out


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", default="leg_counting", help="a name of reasoning-gym")
    parser.add_argument("--config", default=json.dumps(ONE_ANIMAL), help="the task's parameters as JSON")
    parser.add_argument("--output_dir", default="runs/reasoning_gym")
    parser.add_argument("--n_train", type=int, default=3000)
    parser.add_argument("--n_held_out", type=int, default=100)
    options = parser.parse_args(arguments)

    try:
        config = json.loads(options.config)
    except ValueError as error:
        sys.exit(f"--config must be a JSON object such as '{{\"max_value\": 50}}', got {options.config}: {error}")
    try:
        train, held_out = split_rows(
            options.task, n_train=options.n_train, n_held_out=options.n_held_out, config=config
        )
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    print(f"{folder}: {len(train)} problems of {options.task} to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
