"""GRPO with environments: real episodes of a tiny model that calls a tool by chance and learns to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import grpo
from fastrl.report import read_completions, read_log
from fastrl.report.completions import shown_text
from fastrl.train.config import EnvironmentBlock, GRPOConfig, ReportBlock, RewardsBlock
from fastrl.train.guards import NoVerdictError
from tests.recipes.agents import make_agent_base
from tests.recipes.runs import column, learning_curve, metrics_of

BUTTONS = EnvironmentBlock(factory="tests.recipes.agent_environments:Buttons", max_tool_calling_iterations=3)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_agent_base(tmp_path_factory.mktemp("agent"))


def config(
    agent: tuple[Path, Path], folder: Path, environment: EnvironmentBlock = BUTTONS, **changes: Any
) -> GRPOConfig:
    made = GRPOConfig(
        model_name_or_path=str(agent[0]),
        train_dataset=str(agent[1]),
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=24,
        num_generations=8,
        max_completion_length=160,
        learning_rate=5e-3,
        environment=environment,
        report=ReportBlock(panel=False, log_completions=24),
    )
    return replace(made, **changes)


def test_episodes_are_trained_logged_and_shown(agent: tuple[Path, Path], tmp_path: Path) -> None:
    # Each step compares the sampler's log-probabilities of the trained tokens with the trainer's and would stop.
    assert grpo.run(config(agent, tmp_path, reward_funcs=("tests.recipes.agent_environments:presses",))) == 0
    first = metrics_of(tmp_path)[0]
    assert not read_log(tmp_path / "errors.jsonl")
    assert first["tools/call_frequency"] > 0
    assert 0 < first["tools/failure_frequency"] < 1  # some calls are broken
    assert first["episodes/turns"] > 1
    assert first["episodes/environment_error_rate"] == 0
    assert 0 <= first["rewards/Buttons/mean"] <= 1
    samples = [sample for _, sample in read_completions(tmp_path / "completions.jsonl")]
    with_tool = next(each for each in samples if any(message["content"] == "1" for message in each.completion))
    assert [message["role"] for message in with_tool.completion][:2] == ["assistant", "tool"]
    assert "-> press()\n[tool] " in shown_text(with_tool.completion)
    assert with_tool.rewards["Buttons"] == 1.0
    assert any(sample.prompt[-1]["content"] == "27" for sample in samples)  # what reset said is in the prompt
    assert "-&gt; press()\n[tool] 1" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_run_repeats_and_the_place_of_its_environments_changes_nothing(
    agent: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, workers in (("a", 2), ("b", 0)):
        assert grpo.run(config(agent, tmp_path / name, replace(BUTTONS, workers=workers))) == 0
    clock = ("episodes/seconds",)
    one, other = (
        [{k: v for k, v in line.items() if k not in clock} for line in learning_curve(tmp_path / n)] for n in "ab"
    )
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_model_learns_to_call_the_tool(agent: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    # The reward is 1 once a call was made: it must be one that can be read, in a turn that ends within 24 tokens. A
    # random model does that in about one episode of three, and breaks every other call.
    block = replace(BUTTONS, turn_advantage_weight=0.5, turn_gamma=0.5, workers=0)
    changes = {"max_steps": 30, "max_completion_length": 24, "learning_rate": 1e-2, "seed": seed}
    assert grpo.run(config(agent, tmp_path, block, **changes)) == 0
    lines = metrics_of(tmp_path)
    reward, failures = column(lines, "reward"), column(lines, "tools/failure_frequency")
    assert sum(reward[:2]) / 2 < 0.45
    assert sum(reward[-8:]) / 8 > 0.85
    assert failures[0] > 0.3
    assert failures[-1] < 0.1


def test_a_run_is_not_resumed_with_another_environment(agent: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("from tests.recipes.agent_environments import Buttons\n\n\nclass Mine(Buttons):\n    pass\n")
    block = replace(BUTTONS, factory=f"{source}:Mine", workers=0)
    assert grpo.run(config(agent, tmp_path / "run", block, max_steps=1, save_steps=1)) == 0
    source.write_text(source.read_text() + "\n    # another game\n")
    with pytest.raises(ValueError, match=r"mine\.py"):
        grpo.run(config(agent, tmp_path / "run", block, max_steps=2, resume_from_checkpoint="auto"))


@pytest.mark.slow
def test_environments_that_hang_die_or_exit_end_their_own_episodes(
    agent: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    block = replace(BUTTONS, factory="tests.recipes.agent_environments:Hanging", tool_timeout_seconds=0.5)
    rewards = RewardsBlock(workers=0)
    assert (
        grpo.run(config(agent, tmp_path, block, rewards=rewards, per_device_train_batch_size=24, num_generations=8))
        == 0
    )
    first = metrics_of(tmp_path)[0]
    assert 0 < first["episodes/environment_error_rate"] < 1
    assert first["sampling/error_rate"] == first["episodes/environment_error_rate"]
    assert read_log(tmp_path / "errors.jsonl")[0]["reward"] == "environment"
    assert "'environment' failed on" in capfd.readouterr().err


def test_an_environment_that_ends_every_episode_stops_the_run(agent: tuple[Path, Path], tmp_path: Path) -> None:
    block = replace(BUTTONS, factory="tests.recipes.agent_environments:Unmade", workers=0)
    with pytest.raises(NoVerdictError, match=r"'environment' failed on 24 of 24[\s\S]*no such server"):
        grpo.run(config(agent, tmp_path, block, max_steps=9))
    assert len(metrics_of(tmp_path)) == 3


def test_data_without_a_column_that_reset_needs_is_refused(agent: tuple[Path, Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": [{"role": "user", "content": "1"}]}\n')
    with pytest.raises(ValueError, match="reset of the environment needs the column 'start'"):
        grpo.run(config(agent, tmp_path / "run", train_dataset=str(rows)))


def test_plain_prompts_cannot_show_tools(agent: tuple[Path, Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "start": 1}\n')
    with pytest.raises(ValueError, match=r"set data\.apply_chat_template"):
        grpo.run(config(agent, tmp_path / "run", train_dataset=str(rows)))
