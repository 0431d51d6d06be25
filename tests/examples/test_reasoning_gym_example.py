"""examples/reasoning_gym: rows of a real task, and each configuration run for a step; skipped without the package."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastrl.cli import main

needs_package = pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed; pip install 'reasoning-gym>=0.1.23'"
)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.skipif(find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_an_absent_package_gives_one_sentence(load):
    with pytest.raises(SystemExit, match="pip install 'reasoning-gym"):
        load("reasoning_gym/prepare.py").main([])


def test_a_broken_task_configuration_gives_one_sentence(load):
    with pytest.raises(SystemExit, match="--config must be a JSON object"):
        load("reasoning_gym/prepare.py").main(["--config", '{"max_value": '])


@needs_package
@pytest.mark.filterwarnings("ignore")  # the package and what it imports warn in their own right
def test_every_command_of_the_example_runs(inside: Path, load, capsys: pytest.CaptureFixture[str]):
    folder = inside / "runs" / "reasoning_gym"
    load("reasoning_gym/prepare.py").main(["--n_train", "60", "--n_held_out", "8"])
    train, held_out = rows(folder / "train.jsonl"), rows(folder / "held_out.jsonl")
    assert len({row["prompt"] for row in held_out}) == 8
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}

    load("tiny_model.py").main([str(folder / "train.jsonl"), str(folder / "base"), "--hidden_size", "32"])
    assert main(["run", "examples/reasoning_gym/sft.yaml", "--max_steps", "2"]) == 0
    assert main(["run", "examples/reasoning_gym/eval.yaml"]) == 0
    grpo = ["run", "examples/reasoning_gym/grpo.yaml", "--per_device_train_batch_size", "16"]
    assert main([*grpo, "--max_steps", "1", "--logging_steps", "1"]) == 0
    (logged,) = rows(folder / "grpo" / "metrics.jsonl")
    assert logged["rewards/reasoning_gym/error_rate"] == 0
    assert "reasoning_gym: " in capsys.readouterr().out
