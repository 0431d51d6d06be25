"""Evaluation and generation with environments: episodes are played, judged and written as they are in training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.data.check import check_rows
from fastrl.data.formats import PROMPT_COMPLETION
from fastrl.data.readers import read_rows
from fastrl.recipes import evaluate, generate
from fastrl.report import read_completions
from fastrl.train.config import EnvironmentBlock, EvalConfig, GenerateConfig
from tests.recipes.agents import make_agent_base

BUTTONS = EnvironmentBlock(factory="tests.recipes.agent_environments:Buttons", max_tool_calling_iterations=3, workers=0)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_agent_base(tmp_path_factory.mktemp("agent"))


def eval_config(agent: tuple[Path, Path], environment: EnvironmentBlock = BUTTONS, **changes: Any) -> EvalConfig:
    made = EvalConfig(
        model_name_or_path=str(agent[0]),
        eval_dataset=str(agent[1]),
        num_generations=8,
        temperature=1.0,
        max_completion_length=160,
        environment=environment,
    )
    return replace(made, **changes)


def generate_config(agent: tuple[Path, Path], output: Path, **changes: Any) -> GenerateConfig:
    made = GenerateConfig(
        model_name_or_path=str(agent[0]),
        prompt_file=str(agent[1]),
        output_file=str(output),
        num_generations=8,
        max_completion_length=160,
        environment=BUTTONS,
    )
    return replace(made, **changes)


def presses_shown(messages: list[dict[str, Any]]) -> int:
    """Presses whose results the model was shown; a last one may have been left out for want of room."""
    return sum(message["role"] == "tool" and "error" not in message["content"] for message in messages)


def test_an_agent_is_evaluated_by_its_environment(
    agent: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.run(eval_config(agent, output_dir=str(tmp_path))) == 0
    samples = [sample for _, sample in read_completions(tmp_path / "completions.jsonl")]
    assert len(samples) == 24
    for sample in samples:
        assert sample.rewards["Buttons"] == 1.0 or presses_shown(sample.completion) == 0
    record = json.loads((tmp_path / "eval.json").read_text())
    assert 0 < record["Buttons"]["mean"] < 1
    assert record["Buttons"]["mean"] == pytest.approx(sum(s.rewards["Buttons"] or 0.0 for s in samples) / 24)
    assert record["episodes"]["tools/call_frequency"] > 0
    assert "episodes/turns: " in capsys.readouterr().out


def test_an_environment_may_be_the_user_that_the_model_talks_to(agent: tuple[Path, Path], tmp_path: Path) -> None:
    block = EnvironmentBlock(factory="tests.recipes.agent_environments:Counting", workers=0)
    assert evaluate.run(eval_config(agent, block, max_completion_length=30, output_dir=str(tmp_path))) == 0
    samples = [sample for _, sample in read_completions(tmp_path / "completions.jsonl")]
    for sample in samples:
        said = [message["content"] for message in sample.completion if message["role"] == "user"]
        assert said == ["1", "2"][: len(said)]
        assert [message["role"] for message in sample.completion][: 2 * len(said)] == ["assistant", "user"] * len(said)
        # A reply for which there was no room is left out, and was given.
        assert sample.rewards["Counting"] in (len(said), len(said) + 1)
    assert {sample.rewards["Counting"] for sample in samples} == {0.0, 1.0, 2.0}


def test_an_environment_that_fails_too_often_fails_the_evaluation(
    agent: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = replace(BUTTONS, factory="tests.recipes.agent_environments:Raising")
    assert evaluate.run(eval_config(agent, block, reward_funcs=("tests.recipes.agent_environments:presses",))) == 1
    said = capsys.readouterr().err
    assert "environment failed on 8 completions" in said
    assert "no such start" in said


def test_every_episode_is_a_row_with_its_messages_and_tools(agent: tuple[Path, Path], tmp_path: Path) -> None:
    assert generate.run(generate_config(agent, tmp_path / "all.jsonl")) == 0
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    for row in rows:
        assert row["reward"] == 1.0 or presses_shown(row["completion"]) == 0
        assert row["tools"][0]["function"]["name"] == "press"
        assert 0 < row["tokens"] <= 160
    assert {row["prompt"][-1]["content"] for row in rows} == {"0", "1", "27"}  # what reset said is in the prompt


def test_episodes_that_the_environment_rewards_become_supervised_rows(agent: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "sft.jsonl"
    assert generate.run(generate_config(agent, output, verify=("environment",))) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows
    assert all(row["reward"] == 1.0 and presses_shown(row["completion"]) > 0 for row in rows)
    assert len({json.dumps(row) for row in rows}) == len(rows)
    assert check_rows(read_rows(str(output)), (PROMPT_COMPLETION,)).is_conversational


def test_an_environment_without_a_reward_cannot_verify(agent: tuple[Path, Path], tmp_path: Path) -> None:
    block = EnvironmentBlock(factory="tests.recipes.agent_environments:Silent", workers=0)
    config = generate_config(agent, tmp_path / "x.jsonl", verify=("environment",), environment=block)
    with pytest.raises(ValueError, match="has no such method"):
        generate.run(config)
