"""A teacher of the sorting task's vocabulary, and small runs that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrl.recipes import distill, gkd, teacher
from fastrl.recipes.sorting import make_base_model
from fastrl.train.config import DistillConfig, GKDConfig, ReportBlock, TeacherConfig
from tests.recipes.runs import Base, metrics_of

TRAINING: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "report": ReportBlock(panel=False),
}


def make_teacher(folder: Path) -> Path:
    """Random weights, wider than the student's."""
    make_base_model(folder, seed=7, hidden_size=24)
    return folder


def distill_config(base: Base, output_dir: Path, **changes: Any) -> DistillConfig:
    paths = {"model_name_or_path": str(base.model), "train_dataset": str(base.files.sft)}
    return DistillConfig(**(paths | {"output_dir": str(output_dir)} | TRAINING | changes))


def gkd_config(base: Base, output_dir: Path, **changes: Any) -> GKDConfig:
    paths = {"model_name_or_path": str(base.model), "train_dataset": str(base.files.sft)}
    options = paths | {"output_dir": str(output_dir), "max_new_tokens": 8} | TRAINING | changes
    return GKDConfig(**options)


def run_distill(base: Base, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    assert distill.run(distill_config(base, folder, **changes)) == 0
    return metrics_of(folder)


def run_gkd(base: Base, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    assert gkd.run(gkd_config(base, folder, **changes)) == 0
    return metrics_of(folder)


def store(base: Base, model: Path, file: Path, **changes: Any) -> str:
    """What `fastrl teacher` writes for the supervised rows."""
    options: dict[str, Any] = {"train_dataset": str(base.files.sft), "top_k": 14} | changes
    assert teacher.run(TeacherConfig(model_name_or_path=str(model), output_file=str(file), **options)) == 0
    return str(file)
