"""What `tiny:NAME` stands for: made once, alike each time, and found by every recipe that names it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastrl.recipes import tiny
from fastrl.recipes.tiny import made, swapped, with_tiny
from fastrl.train.config import SFTConfig
from fastrl.train.model import load_tokenizer
from fastrl.train.tiny_files import FILES


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prompts_of(path: Path) -> set[str]:
    return {json.dumps(json.loads(line)["prompt"]) for line in path.read_text().splitlines()}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_made_alike_each_time_and_shares_no_question_with_its_held_out_part(name: str) -> None:
    path = made(name)
    before = path.read_bytes()
    assert len(before.splitlines()) == tiny.N_TRAIN * tiny.ROWS_PER_QUESTION.get(name, 1)
    path.unlink()
    assert made(name).read_bytes() == before
    assert not prompts_of(path) & prompts_of(made(f"{name}_held_out"))


def test_what_is_there_is_not_made_again() -> None:
    path = made("sft")
    path.write_text("mine")
    assert made("sft").read_text() == "mine"


def test_a_configuration_gets_paths_in_place_of_names() -> None:
    config = with_tiny(SFTConfig(model_name_or_path="tiny:base", train_dataset="tiny:sft", output_dir="runs/x"))
    assert len(load_tokenizer(config.model_name_or_path, chat_template=None)) == 14
    assert Path(config.train_dataset).is_file()
    assert config.output_dir == "runs/x"


def test_rejected_digits_are_the_chosen_ones_in_another_order() -> None:
    generator = random.Random(0)
    for digits in ("012345", "000001", "112233"):
        wrong = swapped(digits, generator)
        assert wrong != digits
        assert sorted(wrong) == sorted(digits)
    assert swapped("444444", generator) == "444445"


def test_lists_steps_and_judgements_say_what_is_sorted() -> None:
    generator = random.Random(0)
    for number in range(0, 10**6, 99_991):
        question = f"{number:06d}"
        right = "".join(sorted(question))
        ranked = tiny.MAKE_ROW["ranked"](question, generator)
        answers = [completion[0]["content"] for completion in ranked["completions"]]
        assert answers[ranked["scores"].index(1.0)] == right
        assert 0 <= min(ranked["scores"]) < 1
        steps = tiny.MAKE_ROW["steps"](question, generator)
        written = "".join(step[0]["content"] for step in steps["completions"])
        assert all(steps["labels"]) == (written == right)
        judged = tiny.MAKE_ROW["judgements"](question, generator)
        assert (judged["answer"] == "1") == (judged["prompt"][0]["content"] == question + right)
