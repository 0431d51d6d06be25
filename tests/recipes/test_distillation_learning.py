"""What a student gains from its teacher, median of five seeds: data whose labels are partly wrong, or none at all."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from fastrl.recipes import evaluate, sft
from fastrl.recipes.sorting import make_base_model, sft_config, write_task
from fastrl.recipes.tiny import swapped
from fastrl.train.config import EvalConfig
from tests.recipes.distillation import run_distill, run_gkd
from tests.recipes.runs import Base

N_ROWS, N_TEACHER, N_HELD_OUT = 400, 4000, 250
SHARE_WRONG = 0.3


def with_wrong_labels(source: Path, path: Path, *, seed: int) -> Path:
    """The first rows of a file; in some of them two digits of the answer have changed places."""
    generator = random.Random(seed)
    rows = [json.loads(line) for line in source.read_text().splitlines()[:N_ROWS]]
    for row in rows:
        if generator.random() < SHARE_WRONG:
            answer = row["completion"][0]
            answer["content"] = swapped(answer["content"], generator)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def accuracy(model: Path, data: Path, folder: Path) -> float:
    """Share of held-out questions answered exactly, greedy."""
    config = EvalConfig(
        model_name_or_path=str(model),
        eval_dataset=str(data),
        reward_funcs=("exact_match",),
        max_completion_length=8,
        output_dir=str(folder),
    )
    assert evaluate.run(config) == 0
    found: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return float(found["exact_match"]["mean"])


@pytest.mark.slow
def test_a_distilled_student_beats_one_that_learns_the_same_labels(tmp_path: Path) -> None:
    files = write_task(tmp_path / "data", seed=0, n_sft=N_TEACHER, n_prompts=N_TEACHER, n_held_out=N_HELD_OUT)
    make_base_model(tmp_path / "base", seed=0)
    config = sft_config(tmp_path / "base", tmp_path / "teacher", files.sft, seed=0)
    assert sft.run(replace(config, max_steps=160)) == 0
    teacher = tmp_path / "teacher" / "model"
    found: dict[str, list[float]] = {"labels": [], "distill": [], "gkd": [], "untrained": []}
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        make_base_model(folder / "student", seed=seed, hidden_size=32, layers=1)
        data = with_wrong_labels(files.sft, folder / "train.jsonl", seed=seed)
        base = Base(folder / "student", files)
        common: dict[str, Any] = {"train_dataset": str(data), "seed": seed, "max_steps": 200, "adam_beta2": 0.99}
        common |= {"per_device_train_batch_size": 128, "learning_rate": 3e-3, "warmup_steps": 10}
        learned = {"teacher_model_name_or_path": str(teacher)}
        config = sft_config(folder / "student", folder / "labels", data, seed=seed)
        assert sft.run(replace(config, max_steps=200)) == 0
        run_distill(base, folder / "distill", **common, **learned)
        run_gkd(base, folder / "gkd", **common, **learned, lmbda=1.0, temperature=1.0)
        for name in ("labels", "distill", "gkd"):
            found[name].append(accuracy(folder / name / "model", files.held_out, folder / f"{name}-eval"))
        found["untrained"].append(accuracy(folder / "student", files.held_out, folder / "untrained-eval"))
    print({name: [round(x, 3) for x in values] for name, values in found.items()})
    medians = {name: median(values) for name, values in found.items()}
    assert medians["untrained"] < 0.01
    assert medians["distill"] > medians["labels"]
    assert medians["gkd"] > medians["labels"]
