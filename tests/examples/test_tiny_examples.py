"""Every file of examples/tiny is a valid run; the slow tests take each to its end and look for what it learned.

The agents' runs are in test_tiny_agents.py.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import yaml

from fastrl.cli import configure, main
from fastrl.command.settings import Refused

FOLDER = Path(__file__).parents[2] / "examples" / "tiny"
FILES = sorted(FOLDER.glob("*.yaml"))
NAMES = (
    *("sft", "lora", "qlora", "reward", "prm", "genrm", "dpo", "ipo", "simpo", "orpo", "kto", "rrhf", "online_dpo"),
    *("ppo", "ppo_ptx", "grpo", "dr_grpo", "dapo", "rloo", "gspo", "distill", "gkd", "rejection", "r1"),
    *("r1_zero", "instructgpt", "dpo_then_grpo", "agent", "agent_search"),
)
# The number that shows the learning, where it is not the loss on held-out rows, and whether it should grow.
RISES = ("eval/reward", "eval/rewards/accuracies", "eval/accuracy", "eval/rewards/margins")


def test_the_whole_map_has_an_example() -> None:
    assert {file.stem for file in FILES} >= set(NAMES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_valid(file: Path) -> None:
    recipe = yaml.safe_load(file.read_text())["recipe"]
    if file.stem == "vllm" and find_spec("vllm") is None:
        # Every problem is a line of its own: but for vLLM all is right.
        with pytest.raises(Refused, match=r"^[^\n]*vLLM is not installed[^\n]*$"):
            configure(recipe, str(file), [])
        return
    configure(recipe, str(file), [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples, so that the tiny models are made once."""
    return tmp_path_factory.mktemp("tiny")


SHORT = [file for file in FILES if not file.stem.startswith("agent") and file.stem != "vllm"]  # tests/vllm has that


@pytest.mark.slow
@pytest.mark.parametrize("file", SHORT, ids=lambda file: file.stem)
def test_an_example_learns_in_less_than_two_minutes_of_one_core(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    started = process_time()
    assert main(["run", str(file)]) == 0
    assert process_time() - started < 120
    record = yaml.safe_load(file.read_text())
    output = folder / record["output_dir"]
    if record["recipe"] == "pipeline":
        assert_ends_better(output, [name for name, stage in record["stages"].items() if stage["recipe"] == "eval"])
    else:
        assert_learned(output)


PIPELINES = [file for file in SHORT if yaml.safe_load(file.read_text())["recipe"] == "pipeline"]


@pytest.mark.slow
@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.stem)
def test_a_pipeline_ends_better_than_it_began_with_every_seed(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    stages = yaml.safe_load(file.read_text())["stages"]
    for seed in ("1", "2", "3", "4", "5"):
        output = folder / f"{file.stem}-{seed}"
        flags = [part for name in stages for part in (f"--stages.{name}.seed", seed)]
        assert main(["run", str(file), "--output_dir", str(output), *flags]) == 0
        assert_ends_better(output, [name for name, stage in stages.items() if stage["recipe"] == "eval"])


def assert_ends_better(output: Path, evaluations: list[str]) -> None:
    """The last evaluation of the policy beats the first; that of a smaller student is another model's."""
    rated = [name for name in evaluations if "student" not in name]
    found = [json.loads((output / name / "eval.json").read_text())["exact_match"] for name in rated]
    first, last = found[0], found[-1]
    print(f"{output.name}: {first['mean']:.3f} -> {last['mean']:.3f}")
    assert last["mean"] - first["mean"] > 3 * (first["standard_error"] ** 2 + last["standard_error"] ** 2) ** 0.5


def assert_learned(output: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for name in RISES:
        values = [line[name] for line in lines if name in line]
        if len(values) >= 2:
            assert values[-1] > values[0] or values[-1] == 1.0, (name, values)
            return
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line] or [line["loss"] for line in lines]
    assert losses[-1] < 0.9 * losses[0], losses
