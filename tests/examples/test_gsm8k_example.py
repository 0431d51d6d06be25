"""examples/gsm8k: what its scripts compute, and each configuration run for a step on real rows."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrl.cli import main
from fastrl.data.formats import PROMPT_COMPLETION
from fastrl.data.tokenize import encode_prompt_completion

SETTINGS = ("sft", "grpo", "eval")
SMALL = ("--per_device_train_batch_size", "16", "--logging_steps", "1")


@pytest.fixture(scope="module")
def trained(workplace: Path, shared_data: Path, load) -> Iterator[Path]:
    """The example's folder after every command of run.sh, each as short as it can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setattr(sys, "path", list(sys.path))
        data = str(shared_data / "gsm8k")
        load("gsm8k/prepare.py").main(["--data", data, "--max_rows", "110", "--n_held_out", "6"])
        load("tiny_model.py").main(
            ["runs/gsm8k/train.jsonl", "runs/gsm8k/base", "--vocab_size", "500", "--hidden_size", "32", "--layers", "1"]
        )
        assert main(["run", "examples/gsm8k/sft.yaml", "--max_steps", "2", "--eval_steps", "1", *SMALL]) == 0
        short = ["--max_completion_length", "12"]
        # Random weights write no equation, so nothing is there for `true_equations` to judge.
        judged = ["--reward_funcs", "numeric", "examples/gsm8k/rewards.py:answer_line"]
        evaluate = ["run", "examples/gsm8k/eval.yaml", *short, "--num_generations", "1", *judged]
        assert main([*evaluate, "--output_dir", "runs/gsm8k/eval-sft"]) == 0
        assert main(["run", "examples/gsm8k/grpo.yaml", "--max_steps", "1", *SMALL, *short]) == 0
        model = ["--model_name_or_path", "runs/gsm8k/grpo/model"]
        assert main([*evaluate, *model, "--output_dir", "runs/gsm8k/eval-grpo"]) == 0
        yield workplace / "runs" / "gsm8k"


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prepared_row_has_the_solution_without_calculator_marks(load):
    prepared = load("gsm8k/prepare.py").prepared
    solution = "48/2 = <<48/2=24>>24 clips.\nShe sold <<48*50=2400>>2,400.\n#### 2,400"
    assert prepared({"question": "How many?", "answer": solution}) == {
        "prompt": "How many?",
        "completion": "48/2 = 24 clips.\nShe sold 2,400.\n#### 2,400",
        "answer": "2,400",
    }


def test_the_split_is_the_same_each_time_and_shares_no_prompt(trained: Path, shared_data: Path, load, inside: Path):
    train, held_out = rows(trained / "train.jsonl"), rows(trained / "held_out.jsonl")
    assert len(held_out) == 6
    assert len(train) >= 50
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all(len(row["prompt"]) + len(row["completion"]) <= 500 for row in train)

    arguments = ["--data", str(shared_data / "gsm8k"), "--max_rows", "110", "--n_held_out", "6"]
    load("gsm8k/prepare.py").main([*arguments, "--output_dir", "again"])
    assert (inside / "again" / "train.jsonl").read_bytes() == (trained / "train.jsonl").read_bytes()


def test_a_repeated_prompt_is_not_on_both_sides(load):
    twice = [{"prompt": f"q{i % 5}", "completion": "c", "answer": "1"} for i in range(10)]
    train, held_out = load("gsm8k/prepare.py").split(twice, max_characters=10, n_held_out=2, seed=0)
    assert sorted(row["prompt"] for row in train + held_out) == ["q0", "q1", "q2", "q3", "q4"]


def test_absent_data_gives_one_sentence_with_the_source(load, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"GSM8K is not at .*grade-school-math.*pass its folder as --data"):
        load("gsm8k/prepare.py").main(["--data", str(tmp_path)])


def test_the_tokenizer_encodes_any_text_digit_by_digit_and_gives_it_back(load):
    tokenizer = load("tiny_model.py").make_tokenizer(["a plain text 1234 1234 1234"], vocab_size=300)
    text = "12345 Ünïcode\n\t🙂 #### 7"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    ids, is_trained = encode_prompt_completion(
        tokenizer, [{"role": "user", "content": "ab"}], [{"role": "assistant", "content": "ab"}]
    )
    assert tokenizer.decode(ids) == "<|user|>ab<|assistant|>ab<|end|>"
    assert tokenizer.decode([token for token, is_on in zip(ids, is_trained, strict=True) if is_on]) == "ab<|end|>"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("She has 2 + 2 = 4.\n#### 4", 1.0),
        ("#### 4", 0.0),  # no solution before it
        ("Half.\n#### -1,250.50 ", 1.0),
        ("Cost.\n#### $12", 1.0),
        ("Four.\n#### four", 0.0),
        ("Four.\n#### 4 apples", 0.0),
        ("Four.\n#### 4\nSo", 0.0),
        ("Four.\n#### 3\n#### 4", 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_line_is_the_last_line_and_a_number(load, completion: str, reward: float):
    assert load("gsm8k/rewards.py").answer_line([completion]) == [reward]
    assert load("gsm8k/rewards.py").answer_line([[{"role": "assistant", "content": completion}]]) == [reward]


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        ("5 + 6 = 11", 1.0),
        ("5 + 6 = 12", 0.0),
        ("5+6=11 and 11-1=9", 0.5),
        ("$5 x 3 = $15", 1.0),
        ("$1,000 / 8 = $125.", 1.0),
        ("10 / 3 = 3.33", 1.0),  # rounded to what is shown
        ("10 / 3 = 3.34", 0.0),
        ("10 / 3 = 3", 0.0),  # whole numbers are exact
        ("4 / 0 = 4", 0.0),
        ("2 - 5 = -3", 1.0),
        ("1 + 2 + 3 = 6", None),  # a chain is not judged by its tail
        ("$1 + $2 + $3 = $6", None),
        ("800 x 15/100 = 120", None),
        ("80/100 = 4/5", None),
        ("3x-5=16", None),
        ("no equation", None),
    ],
)
def test_equations_are_judged_exactly_and_chains_not_at_all(load, completion: str, share: float | None):
    assert load("gsm8k/rewards.py").true_equations([completion]) == [share]


def test_real_solutions_have_the_form_and_nearly_all_their_equations_hold(load, shared_data: Path):
    prepared, rewards = load("gsm8k/prepare.py").prepared, load("gsm8k/rewards.py")
    with (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        completions = [prepared(json.loads(line))["completion"] for line in file]
    assert sum(rewards.answer_line(completions)) == len(completions)
    shares = [share for share in rewards.true_equations(completions) if share is not None]
    assert len(shares) > 0.8 * len(completions)
    assert sum(shares) / len(shares) > 0.995


@pytest.mark.parametrize("name", SETTINGS)
def test_every_configuration_is_valid(trained: Path, inside: Path, name: str, capsys: pytest.CaptureFixture[str]):
    flags = () if name == "eval" else ("--output_dir", "runs/other")
    assert main(["config", "check", f"examples/gsm8k/{name}.yaml", *flags]) == 0
    assert capsys.readouterr().out == f"examples/gsm8k/{name}.yaml: valid ({name})\n"


def test_the_configurations_train_on_the_rows_as_they_are(trained: Path):
    assert set(PROMPT_COMPLETION.columns) <= set(rows(trained / "train.jsonl")[0])
    assert [line["step"] for line in rows(trained / "sft" / "metrics.jsonl") if "loss" in line] == [1, 2]
    (grpo,) = [line for line in rows(trained / "grpo" / "metrics.jsonl") if "reward" in line]
    assert grpo["reward"] == pytest.approx(grpo["rewards/numeric/mean"] + grpo["rewards/answer_line/mean"])


def test_the_summary_reads_what_the_commands_wrote(trained: Path, load, capsys: pytest.CaptureFixture[str]):
    load("gsm8k/summary.py").main(["--run", str(trained)])
    printed = capsys.readouterr().out
    for expected in ("SFT loss, held out", "GRPO reward", "right number", "always answering", "cannot do"):
        assert expected in printed


def test_the_summary_compares_with_the_most_frequent_answer_and_adds_errors_in_squares(load):
    summary = load("gsm8k/summary.py")
    train, held_out = [{"answer": text} for text in "5575"], [{"answer": text} for text in "5777"]
    assert summary.constant_guess(train, held_out) == ("5", 0.25, pytest.approx((0.25 * 0.75 / 4) ** 0.5))
    before = {reward: {"mean": 0.1, "standard_error": 0.03} for reward in summary.MEANING}
    after = {reward: {"mean": 0.5, "standard_error": 0.04} for reward in summary.MEANING}
    assert summary.table({"before": before, "after": after})[1].split() == (
        ["right", "number", "10.0", "+-", "3.0", "%", "50.0", "+-", "4.0", "%", "+40.0", "+-", "5.0", "%"]
    )


@pytest.mark.slow
def test_the_whole_example_learns_within_ten_minutes_of_two_cores(workplace: Path, shared_data: Path):
    shutil.rmtree(workplace / "runs", ignore_errors=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["examples/gsm8k/run.sh", str(shared_data / "gsm8k")]
    subprocess.run(command, cwd=workplace, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 600

    folder = workplace / "runs" / "gsm8k"
    metrics = rows(folder / "sft" / "metrics.jsonl")
    losses = [line["eval/loss"] for line in metrics if "eval/loss" in line]
    assert losses[-1] < losses[0] - 0.3
    found = [json.loads((folder / f"eval-{name}" / "eval.json").read_text()) for name in ("sft", "grpo")]
    assert found[1]["answer_line"]["mean"] > found[0]["answer_line"]["mean"] + 0.1


def test_the_tiny_model_is_made_from_rows_of_messages_too(load, tmp_path: Path):
    message = '[{"role": "user", "content": "one and one"}]'
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": {message}, "completion": {message}}}\n')
    load("tiny_model.py").main([str(tmp_path / "rows.jsonl"), str(tmp_path / "base"), "--hidden_size", "32"])
    assert (tmp_path / "base" / "model.safetensors").is_file()
