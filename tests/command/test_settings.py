"""Reading YAML with lines, reading flags, and what is said about keys that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.command.fields import Option, options
from fastrl.command.settings import Refused, Setting, read_flags, read_yaml, unknown_keys
from fastrl.train.config import GRPOConfig

GRPO = options(GRPOConfig)
BLOCKS = {option.key for option in GRPO if option.block}


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def refusal(call: object, *arguments: object, **named: object) -> str:
    with pytest.raises(Refused) as caught:
        call(*arguments, **named)  # type: ignore[operator]
    return str(caught.value)


def test_every_value_is_text_with_the_line_of_its_key(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 010\noutput_dir: no\n\nlearning_rate:\n  1e-6\neval_dataset: ~\nstop: [1, yes]\n")
    assert read_yaml(path) == [
        Setting("seed", "010", f"{path}:1"),
        Setting("output_dir", "no", f"{path}:2"),
        Setting("learning_rate", "1e-6", f"{path}:4"),
        Setting("eval_dataset", None, f"{path}:6"),
        Setting("stop", ["1", "yes"], f"{path}:7"),
    ]


def test_blocks_become_dotted_keys_and_mappings_that_are_values_stay_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "data:\n  columns: {prompt: question}\n  max_rows: 3\noverlong.buffer: 4\n")
    assert read_yaml(path, blocks=BLOCKS) == [
        Setting("data.columns", {"prompt": "question"}, f"{path}:2"),
        Setting("data.max_rows", "3", f"{path}:3"),
        Setting("overlong.buffer", "4", f"{path}:4"),
    ]


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nbeta: 0\nseed: 1\n")
    assert refusal(read_yaml, path) == f"{path}:3: 'seed' is already set at {path}:1; keep one"
    path = write(tmp_path, "data:\n  max_rows: 3\ndata.max_rows: 4\n")
    assert f"{path}:3: 'data.max_rows' is already set at {path}:2" in refusal(read_yaml, path, blocks=BLOCKS)
    path = write(tmp_path, "data:\n  columns:\n    a: b\n    a: c\n")
    assert f"{path}:4: expected plain keys, each once" in refusal(read_yaml, path, blocks=BLOCKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n b: 2\n", ":2: not valid YAML: mapping values are not allowed here"),
        ("a: [1\nb: 2\n", ":2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", ":2: not valid YAML"),
        ("- a\n", ":1: expected lines of the form `key: value`"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
        ("[a]: 1\n", ":1: expected a plain key"),
        ("a: &x [*x]\n", ": is nested too deeply"),
        ("a: *missing\n", ":1: not valid YAML: found undefined alias"),
        ("a: \x01\n", ": not valid YAML: unacceptable character"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert refusal(read_yaml, path).startswith(path + message)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refusal(read_yaml, str(tmp_path / "no.yaml")).endswith("cannot be read: No such file or directory")
    assert refusal(read_yaml, str(tmp_path)).endswith("cannot be read: Is a directory")
    (tmp_path / "latin").write_bytes(b"a: \xe9")
    assert refusal(read_yaml, str(tmp_path / "latin")).endswith("latin: is not UTF-8 text")


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "# nothing\n")) == []


def values(*arguments: str) -> dict[str, object]:
    return {setting.key: setting.value for setting in read_flags(arguments, GRPO)}


def test_flags_take_one_value_or_a_list_or_stand_alone() -> None:
    assert values("--max_steps", "-1", "--output_dir=a=b") == {"max_steps": "-1", "output_dir": "a=b"}
    assert values("--reward_funcs", "numeric", "format") == {"reward_funcs": ["numeric", "format"]}
    assert values("--reward_funcs", "[numeric, format]") == {"reward_funcs": "[numeric, format]"}
    assert values("--gradient_checkpointing", "--beta", "0") == {"gradient_checkpointing": "true", "beta": "0"}
    assert values("--gradient_checkpointing", "false") == {"gradient_checkpointing": "false"}
    assert values("--reward_weights", "null") == {"reward_weights": None}


def test_dashes_inside_names_and_the_short_resume_are_understood() -> None:
    assert values("--max-steps", "3", "--data.max-rows=2", "--resume", "auto") == {
        "max_steps": "3",
        "data.max_rows": "2",
        "resume_from_checkpoint": "auto",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.yaml"], "unexpected argument 'run.yaml': write --config run.yaml"),
        (["--seed"], "--seed: needs a value: a whole number"),
        (["--stop"], "--stop: needs a value: a list of texts"),
        (["--output_dir", "a", "b"], "--output_dir: takes one value, got 2; quote a value that has spaces"),
        (["--seed", "1", "--seed", "2"], "--seed: given twice; keep one"),
        (["--resume", "a", "--resume_from_checkpoint", "b"], "--resume_from_checkpoint: given twice; keep one"),
        (["--data", "{}"], "--data: is a block of options; set one of them: --data.NAME VALUE"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_right_one(arguments: list[str], message: str) -> None:
    assert refusal(read_flags, arguments, GRPO) == message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("num_generatons", "num_generations"),
        ("max_prompt_length", "rollout.max_prompt_length"),
        ("report_to", "report.to"),
        ("data.colums", "data.columns"),
        ("bf16", "dtype"),
        ("use_liger_kernel", "kernels.backend"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_was_probably_meant(key: str, meant: str) -> None:
    (in_file,) = unknown_keys([Setting(key, "1", "run.yaml:12")], GRPO, "grpo")
    assert in_file == f"run.yaml:12: unknown key '{key}' (did you mean '{meant}'?)"
    (on_line,) = unknown_keys(read_flags([f"--{key}", "1"], GRPO), GRPO, "grpo")
    assert on_line == f"unknown flag '--{key}' (did you mean '--{meant}'?)"


def test_an_unknown_key_that_resembles_nothing_points_at_the_list() -> None:
    (line,) = unknown_keys([Setting("zzz", "1", "run.yaml:1")], [Option("seed", int, 0, "")], "sft")
    assert line == "run.yaml:1: unknown key 'zzz'; `fastrl config init sft` lists them all"
