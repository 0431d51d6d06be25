"""What cannot be distilled is said in one line, before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrl.train.config import DistillConfig, GKDConfig, KernelsBlock, PackingBlock, TeacherConfig
from fastrl.train.validate import problems

TRAINING = {"model_name_or_path": "tiny:student", "train_dataset": "tiny:sft", "output_dir": "runs/x"}


def distill(**changes: Any) -> list[str]:
    return problems(DistillConfig(**(TRAINING | {"teacher_model_name_or_path": "tiny:sorted"} | changes)))


def gkd(**changes: Any) -> list[str]:
    return problems(GKDConfig(**(TRAINING | {"teacher_model_name_or_path": "tiny:sorted"} | changes)))


def teacher(**changes: Any) -> list[str]:
    options = {"model_name_or_path": "tiny:sorted", "train_dataset": "tiny:sft", "output_file": "runs/top.safetensors"}
    return problems(TeacherConfig(**(options | changes)))


def test_what_can_run_has_no_problem() -> None:
    assert distill() == gkd() == teacher() == []
    assert distill(loss="jsd", beta=0.1, alpha=0.5, temperature=2.0) == []
    assert gkd(lmbda=1.0, beta=0.0) == gkd(lmbda=0.0, beta=1.0, seq_kd=True) == []


CHOICE = "give either --teacher_model_name_or_path DIR or --teacher_logprobs FILE"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher_model_name_or_path": None}, f"teacher_model_name_or_path: {CHOICE}"),
        ({"teacher_logprobs": __file__}, f"teacher_model_name_or_path: {CHOICE}"),
        ({"teacher_model_name_or_path": "nowhere"}, "teacher_model_name_or_path: nowhere is not a directory"),
        (
            {"teacher_model_name_or_path": None, "teacher_logprobs": __file__, "teacher_dtype": "bfloat16"},
            "teacher_dtype: has no effect on stored log-probabilities; remove it",
        ),
        ({"beta": 0.5}, "beta: has no effect on forward_kl; set loss jsd, or remove it"),
        (
            {"loss": "jsd", "beta": 1.0},
            "beta: 1.0 is no mixture; set it between 0 and 1, or choose loss forward_kl or reverse_kl",
        ),
        ({"temperature": 0.0}, "temperature: 0 leaves no distribution to learn; set it above 0"),
        ({"alpha": 1.0}, "alpha: 1 learns nothing from the teacher; lower it, or use fastrl sft"),
        ({"alpha": 1.5}, "alpha: must be in [0, 1], got 1.5"),
        ({"max_length": None, "truncate": True}, "truncate: has no effect without max_length; set that too"),
        (
            {"packing": PackingBlock(token_budget=512)},
            "packing.token_budget: 512 cannot hold one sequence of max_length 1024; raise it, or lower max_length",
        ),
        (
            {"kernels": KernelsBlock(skip_tolerance=0.1)},
            "kernels.skip_tolerance: has no effect on a divergence, whose rows all count; remove it",
        ),
    ],
)
def test_distillation(changes: dict[str, Any], expected: str) -> None:
    assert distill(**changes) == [expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lmbda": 1.1}, "lmbda: must be in [0, 1], got 1.1"),
        ({"beta": 1.1}, "beta: must be in [0, 1], got 1.1"),
        (
            {"temperature": 0.0},
            "temperature: 0 is greedy, every visit of a prompt would sample the same; set it above 0",
        ),
        (
            {"lmbda": 1.0, "seq_kd": True},
            "seq_kd: has no effect while lmbda is 1, where the student samples every completion; remove it",
        ),
        (
            {"packing": PackingBlock(token_budget=100)},
            "packing.token_budget: 100 cannot hold a completion of max_new_tokens 128; raise it",
        ),
    ],
)
def test_on_policy_distillation(changes: dict[str, Any], expected: str) -> None:
    assert gkd(**changes) == [expected]


def test_a_teachers_file(tmp_path: Path) -> None:
    assert teacher(output_file=str(tmp_path / "top.pt")) == [
        f"output_file: {tmp_path / 'top.pt'} is of an unknown type; name it .safetensors"
    ]
    assert teacher(top_k=0) == ["top_k: 0 keeps nothing of the teacher; set at least 1"]
    assert teacher(temperature=0.0) == ["temperature: 0 leaves no distribution to store; set it above 0"]
