"""What a launcher's numbers and a configuration must fulfil together, before torch is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastrl.cli import main
from fastrl.train.config import DistributedBlock, GRPOConfig, KTOConfig, RolloutBlock, ServerBlock
from fastrl.train.ranks import Ranks, launched_ranks
from fastrl.train.validate import problems


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts the second of two processes."""
    place = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in {**place, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


def about(key: str, config: Any) -> list[str]:
    return [problem for problem in problems(config) if problem.startswith(f"{key}: ")]


def grpo(**changes: Any) -> GRPOConfig:
    return replace(
        GRPOConfig(model_name_or_path="tiny:warm", output_dir="run", train_dataset="tiny:prompts"), **changes
    )


def test_alone_unless_a_launcher_says_all_there_is_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # a scheduler's; nobody could be met
    assert launched_ranks() == Ranks(0, 1, 0, 1)


def test_a_launcher_names_the_place(launched: None) -> None:
    assert launched_ranks() == Ranks(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "abc", "RANK is 'abc', and must be a number from 0"),
        ("RANK", "-1", "RANK is '-1', and must be a number from 0"),
        ("RANK", "2", "RANK is 2 and WORLD_SIZE 2: ranks are numbered from 0"),
        ("WORLD_SIZE", "0", "RANK is 1 and WORLD_SIZE 0"),
        ("LOCAL_RANK", "", "LOCAL_RANK is '', and must be a number"),
        ("LOCAL_WORLD_SIZE", "0", "it counts this process too"),
        ("MASTER_PORT", "any", "MASTER_PORT is 'any', and must be a number"),
        ("MASTER_PORT", "70000", "ports are 1 to 65535"),
        ("MASTER_ADDR", None, "2 processes train together, and MASTER_ADDR is not set: nobody could be met"),
    ],
)
def test_nonsense_of_a_launcher_is_refused_in_a_sentence(
    launched: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str | None,
    words: str,
) -> None:  # fmt: skip
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert main(["sft"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "start with torchrun" in said


def test_groups_are_counted_over_all_ranks(launched: None) -> None:
    assert about("num_generations", grpo(per_device_train_batch_size=4, num_generations=8)) == []
    (found,) = about("num_generations", grpo(per_device_train_batch_size=3, num_generations=8))
    assert "3 x 1 x 1 x 2 ranks = 6 completions are no whole number of groups of 8" in found


def test_a_step_of_two_rows_is_enough_for_kto_on_two_ranks(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = KTOConfig(model_name_or_path="", output_dir="run", train_dataset="", per_device_train_batch_size=1)
    assert about("per_device_train_batch_size", config) == []
    monkeypatch.delenv("RANK")
    assert len(about("per_device_train_batch_size", config)) == 1


def test_fully_sharded_weights_are_refused_in_words() -> None:
    (found,) = about("distributed.shard", grpo(distributed=DistributedBlock(shard="full")))
    assert "is not there" in found
    assert about("distributed.shard", grpo(distributed=DistributedBlock(shard="optimizer"))) == []


def test_engines_that_ranks_cannot_share_are_refused(launched: None) -> None:
    assert len(about("rollout.engine", grpo(rollout=RolloutBlock(engine="vllm")))) >= 1
    (found,) = about("rollout.server.urls", grpo(rollout=RolloutBlock(engine="vllm_server")))
    assert "start the servers first" in found
    running = RolloutBlock(engine="vllm_server", server=ServerBlock(urls=("http://127.0.0.1:8000",)))
    assert about("rollout.server.urls", grpo(rollout=running)) == []


@pytest.mark.parametrize("command", [["eval"], ["grpo", "--dry-run"], ["pipeline", "some.yaml"]])
def test_what_runs_in_one_process_says_so(
    launched: None, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert "runs in one process, and the launcher has started 2" in capsys.readouterr().err
