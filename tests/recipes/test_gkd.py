"""On-policy distillation, whole: who completes a row, the loss of dataset rows, stop and resume, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import gkd
from fastrl.recipes.gkd import completed
from fastrl.rollout.engine import Sampling
from fastrl.train import fit
from fastrl.train.config import PackingBlock, RolloutBlock
from fastrl.train.gkd_rows import GKDRow
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.supervised import Example
from fastrl.types import Rollout
from tests.recipes.distillation import gkd_config, make_teacher, run_distill, run_gkd
from tests.recipes.runs import (
    Base,
    PowerCutError,
    after_call,
    assert_same_run,
    column,
    cut_power,
    send_sigterm,
)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model")


class Speaker:
    """An engine that says one token, over and over; it fails on prompts that begin with 9."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        self.seeds += list(seeds or [])
        said = (self.token,) * sampling.max_completion_length
        return [
            Rollout(tuple(ids), said, (0.0,) * len(said), "error" if ids[0] == 9 else "length", 0) for ids in prompts
        ]

    def load_weights(self, model: Any, version: int) -> None:
        raise AssertionError("the student's engine samples from the student itself")


def rows(n: int) -> list[GKDRow]:
    return [GKDRow((1, 2), Example((1, 2, 3), (False, False, True))) for _ in range(n)]


def test_the_coin_of_a_row_depends_on_its_place_alone_and_falls_as_often_as_it_should(base: Base, big: Path) -> None:
    config = gkd_config(base, Path("unused"), teacher_model_name_or_path=str(big), lmbda=0.3)
    student, teacher = Speaker(4), Speaker(5)
    examples, facts = completed(config, student, teacher, rows(2000), range(2000))
    assert sum(facts["on_policy"]) / 2000 == pytest.approx(0.3, abs=0.03)
    assert all(
        math.isnan(n) != bool(own) for n, own in zip(facts["completions/length"], facts["on_policy"], strict=True)
    )
    assert teacher.seeds == []
    assert examples[0].ids in ((1, 2, 3), (1, 2, *[4] * 8))
    later = completed(config, Speaker(4), teacher, rows(1000), range(1000, 2000))
    assert later[0] == examples[1000:]
    assert later[1]["on_policy"] == facts["on_policy"][1000:]


def test_with_seq_kd_the_teacher_completes_what_the_student_does_not_and_failures_are_left_out(
    base: Base, big: Path
) -> None:
    config = gkd_config(base, Path("unused"), teacher_model_name_or_path=str(big), lmbda=0.5, seq_kd=True)
    student, teacher = Speaker(4), Speaker(5)
    prompts = [GKDRow((9, 2) if place % 4 == 0 else (1, 2), None) for place in range(40)]
    examples, facts = completed(config, student, teacher, prompts, range(40))
    assert len(examples) == 30
    assert len({*student.seeds, *teacher.seeds}) == 40
    for example, own in zip(examples, facts["on_policy"], strict=True):
        assert example == Example((1, 2, *[4 if own else 5] * 8), (False, False, *[True] * 8))
    assert facts["completions/clipped_ratio"] == [1.0] * 30


def test_without_the_students_own_completions_it_is_distillation_on_the_data(
    base: Base, big: Path, tmp_path: Path
) -> None:
    teacher = {"teacher_model_name_or_path": str(big), "eval_dataset": str(base.files.sft)}
    on_data = run_gkd(base, tmp_path / "gkd", lmbda=0.0, beta=0.3, **teacher)
    distilled = run_distill(base, tmp_path / "distill", loss="jsd", beta=0.3, **teacher)
    for name in ("loss", "divergence", "entropy", "grad_norm", "eval/loss"):
        assert column(on_data, name) == column(distilled, name), name
    assert set(column(on_data, "on_policy")) == {0.0}


def test_prompts_alone_are_enough_where_nobody_reads_a_completion(base: Base, big: Path, tmp_path: Path) -> None:
    teacher = {"teacher_model_name_or_path": str(big), "train_dataset": str(base.files.prompts)}
    lines = run_gkd(base, tmp_path / "own", lmbda=1.0, max_steps=25, learning_rate=1e-2, beta=0.0, **teacher)
    assert set(column(lines, "on_policy")) == {1.0}
    assert all(1 <= n <= 8 for n in column(lines, "completions/length"))
    assert sum(column(lines, "divergence")[-5:]) < 0.5 * sum(column(lines, "divergence")[:5])
    run_gkd(base, tmp_path / "seq", lmbda=0.5, seq_kd=True, max_steps=1, **teacher)
    with pytest.raises(ValueError, match="columns prompt, completion"):
        gkd.run(gkd_config(base, tmp_path / "data", lmbda=0.5, **teacher))


@pytest.mark.parametrize("stop", [send_sigterm, cut_power])
@pytest.mark.parametrize("seq_kd", [False, True])
def test_a_run_stopped_after_any_step_resumes_bit_for_bit(
    base: Base, big: Path, tmp_path: Path, seq_kd: bool, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"teacher_model_name_or_path": str(big), "seq_kd": seq_kd, "max_steps": 6}
    changes |= {"save_steps": 3, "eval_dataset": str(base.files.sft)}
    run_gkd(base, tmp_path / "whole", **changes)
    config = gkd_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=5, do=stop)
        if stop is cut_power:
            with pytest.raises(PowerCutError):
                gkd.run(config)
        else:
            assert gkd.run(config) == EXIT_INTERRUPTED
    assert gkd.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)


def test_places_count_on_over_epochs_and_after_a_resume(
    base: Base, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(*args: Any) -> Any:
        seen.extend(args[-1])
        return completed(*args)

    monkeypatch.setattr(gkd, "completed", watched)
    config = gkd_config(base, tmp_path / "run", teacher_model_name_or_path=str(big), max_steps=6, save_steps=2)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=4, do=send_sigterm)
        assert gkd.run(config) == EXIT_INTERRUPTED
    assert gkd.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert seen == list(range(48))  # 40 rows: the second epoch begins at 40


def test_packing_changes_no_curve(base: Base, big: Path, tmp_path: Path) -> None:
    teacher = {"teacher_model_name_or_path": str(big), "max_steps": 3}
    whole = run_gkd(base, tmp_path / "whole", **teacher)
    split = run_gkd(base, tmp_path / "split", packing=PackingBlock(token_budget=20), **teacher)
    for name in ("loss", "divergence", "on_policy", "completions/length"):
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-3), name


def test_what_would_stop_the_run_later_is_refused_with_its_place(base: Base, big: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    lines = base.files.sft.read_text().splitlines()[:3]
    long = json.loads(lines[2])
    long["prompt"][0]["content"] = "1" * 70
    data.write_text("\n".join([*lines[:2], json.dumps(long)]) + "\n")

    def refused(message: str, **changes: Any) -> None:
        options = {"teacher_model_name_or_path": str(big), "train_dataset": str(data)} | changes
        with pytest.raises(ValueError, match=message):
            gkd.run(gkd_config(base, tmp_path / "run", **options))

    refused(r"train\.jsonl:3.*fewer than the model's context of 64 tokens")
    refused(r"at most packing\.token_budget \+ 1 - max_new_tokens = 4 tokens", packing=PackingBlock(token_budget=11))
    refused(r"at most rollout\.max_prompt_length = 7 tokens", rollout=RolloutBlock(max_prompt_length=7))
