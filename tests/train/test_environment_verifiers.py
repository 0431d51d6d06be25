"""Environments of the package verifiers: its own loop, our turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import grpo
from fastrl.report import read_completions
from fastrl.rollout.environment import Environment
from fastrl.train import environment_verifiers
from fastrl.train.config import EnvironmentBlock, GRPOConfig, ReportBlock
from fastrl.train.environment_spec import environment_spec
from fastrl.train.environment_verifiers import check_installed, write_rows
from tests.recipes.agents import make_agent_base
from tests.recipes.runs import metrics_of
from tests.train.test_validate_environment import said as problems_of

MODULE = "tests.train.verifiers_environments"
PROMPT = [{"role": "user", "content": "How many times?"}]

needs_verifiers = pytest.mark.skipif(
    find_spec("verifiers") is None, reason="needs the package: pip install 'verifiers>=0.1.14,<0.4'"
)
# The package warns, and its environments leave their event loop open.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


def spec_of(name: str, **options: Any) -> str:
    return f"verifiers(id={f'{MODULE}:{name}'!r}, options={options!r})"


def made(name: str, **options: Any) -> Environment:
    return environment_spec(EnvironmentBlock(factory=spec_of(name, **options))).make()


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Environment]:
    environment = made(request.param)
    assert environment.answer({"reset": {"prompt": PROMPT, "answer": "20", "info": {"secret": 2}}}) == {
        "observation": None
    }
    yield environment
    environment.close()


def turn(environment: Environment, content: str, *calls: tuple[str, dict[str, Any]], is_cut: bool = False) -> Any:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return environment.answer({"said": message, "is_cut": is_cut})["messages"]


@needs_verifiers
@pytest.mark.parametrize("opened", ["tools"], indirect=True)
def test_tools_run_and_the_rubric_judges(opened: Environment) -> None:
    for _ in range(2):  # the same environment plays one episode after another
        results = turn(opened, "", ("press", {"times": 2}), ("press", {"times": -1}), ("pull", {}))
        assert [(each["role"], each["name"]) for each in results] == [
            ("tool", "press"),
            ("tool", "press"),
            ("tool", "pull"),
        ]
        assert results[0]["content"] == "20"
        assert "no unpressing" in results[1]["content"]
        assert turn(opened, "It is 20.") is None
        assert opened.answer({"finish": True})["reward"] == 1.0
        opened.answer({"reset": {"prompt": PROMPT, "answer": "20"}})


@needs_verifiers
def test_its_tools_are_shown_as_it_describes_them() -> None:
    spec = environment_spec(EnvironmentBlock(factory=spec_of("stateful")))
    assert spec.replies
    (schema,) = spec.schemas()
    assert schema["function"]["name"] == "reveal"
    assert schema["function"]["parameters"]["properties"] == {}  # the secret is not the model's to give
    (schema,) = environment_spec(EnvironmentBlock(factory=spec_of("tools"))).schemas()
    assert schema["function"]["parameters"]["properties"]["times"]["type"] == "integer"


@needs_verifiers
@pytest.mark.parametrize("opened", ["stateful"], indirect=True)
def test_an_environment_adds_arguments_of_its_own(opened: Environment) -> None:
    assert [each["content"] for each in turn(opened, "", ("reveal", {}))] == ["14"]


@needs_verifiers
@pytest.mark.parametrize("opened", ["echo"], indirect=True)
def test_an_environment_speaks_as_the_user_until_its_own_stop(opened: Environment) -> None:
    assert turn(opened, "a") == [{"role": "user", "content": "You said a"}]
    assert turn(opened, "stop") is None
    assert opened.answer({"finish": True})["reward"] == 2.0


@needs_verifiers
@pytest.mark.parametrize("opened", ["echo"], indirect=True)
def test_an_episode_that_is_cut_is_judged_with_what_it_said(opened: Environment) -> None:
    assert turn(opened, "a") is not None
    assert turn(opened, "b", is_cut=True) is not None  # what it would have said next is nobody's
    assert opened.answer({"finish": True})["reward"] == 2.0


@needs_verifiers
@pytest.mark.parametrize("opened", ["echo"], indirect=True)
def test_an_environment_that_breaks_ends_the_episode(opened: Environment) -> None:
    with pytest.raises(RuntimeError, match="ended with InfraError"):
        turn(opened, "break")


@needs_verifiers
def test_another_prompt_than_the_rows_is_refused() -> None:
    environment = made("echo", max_turns=1)
    with pytest.raises(KeyError, match="prompt"):
        environment.answer({"reset": {}})
    environment.close()


@needs_verifiers
def test_its_dataset_becomes_rows(tmp_path: Path) -> None:
    assert write_rows(f"{MODULE}:tools", tmp_path / "rows.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["1", "2"]
    assert rows[0]["prompt"] == PROMPT


@needs_verifiers
@pytest.mark.parametrize(("name", "says"), [("groups", "judges whole groups"), ("text", "makes a str")])
def test_what_cannot_be_played_is_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(name)


@needs_verifiers
@pytest.mark.slow
@pytest.mark.parametrize("name", ["button", "echo"])
def test_it_is_trained_on(name: str, tmp_path: Path) -> None:
    model, rows = make_agent_base(tmp_path, call="push")
    made = GRPOConfig(
        model_name_or_path=str(model),
        train_dataset=str(rows),
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=100,
        environment=EnvironmentBlock(factory=spec_of(name), tool_timeout_seconds=60.0, workers=2),
        report=ReportBlock(panel=False, log_completions=8),
    )
    assert grpo.run(made) == 0  # which compares the log-probabilities of what was sampled and of what is trained
    assert metrics_of(tmp_path / "run")[0]["episodes/environment_error_rate"] == 0
    samples = [sample for _, sample in read_completions(tmp_path / "run" / "completions.jsonl")]
    roles = {message["role"] for sample in samples for message in sample.completion}
    assert roles == {"assistant", "tool" if name == "button" else "user"}
    for sample in samples:
        replies = sum(message["role"] != "assistant" for message in sample.completion)
        if name == "button" and replies:
            assert sample.rewards["Verifiers"] == 1.0
        if name == "echo":
            assert replies <= (sample.rewards["Verifiers"] or 0.0) <= 3


@pytest.mark.parametrize(("found", "is_fine"), [("0.1.13", False), ("0.1.14", True), ("0.3.1", True), ("0.4.0", False)])
def test_other_versions_are_refused_in_one_sentence(found: str, is_fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_verifiers, "version", lambda name: found)
    if is_fine:
        check_installed()
        return
    with pytest.raises(RuntimeError, match=f"verifiers {found} cannot be run here"):
        check_installed()
    assert "pip install 'verifiers>=0.1.14,<0.4'" in problems_of(EnvironmentBlock(factory="verifiers(id='x')"))


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="is about a machine without the package")
def test_a_missing_package_is_a_problem_before_anything_starts() -> None:
    assert "needs the package: pip install" in problems_of(EnvironmentBlock(factory="verifiers(id='x')"))
