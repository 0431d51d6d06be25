from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastrl.train.config import EnvironmentBlock, EvalConfig, GenerateConfig, GRPOConfig, OnlineDPOConfig
from fastrl.train.validate_environment import BUILT_IN_TOOLS, environment_problems, played_problems

OWN = EnvironmentBlock(factory="tests.recipes.agent_environments:Buttons")
GRPO = GRPOConfig(model_name_or_path="m", output_dir="o", train_dataset="d")


def said(block: EnvironmentBlock, config: GRPOConfig = GRPO) -> str:
    return " | ".join(environment_problems(replace(config, environment=block)))


def test_an_environment_and_tools_that_exist_are_fine() -> None:
    block = EnvironmentBlock(
        factory="tests.recipes.agent_environments:Buttons", tools=(f"search(corpus={__file__!r})", "calculator")
    )
    assert said(block) == ""
    assert said(EnvironmentBlock()) == ""


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (EnvironmentBlock(factory="tests.recipes.agent_environments:Button"), "did you mean Buttons"),
        (EnvironmentBlock(factory="Buttons"), "write package.module:name"),
        (EnvironmentBlock(tools=("calculater",)), "did you mean calculator"),
        (EnvironmentBlock(workers=2), "environment.workers: has no effect without tools"),
        (EnvironmentBlock(tools=("calculator",), reward_weight=2.0), "set that too"),
        (EnvironmentBlock(tools=("calculator",), turn_gamma=0.5), "turn_gamma: has no effect"),
    ],
)
def test_what_names_nothing_or_does_nothing_is_a_problem(block: EnvironmentBlock, says: str) -> None:
    assert says in said(block)


def test_turns_are_credited_where_advantages_are_a_completions() -> None:
    block = EnvironmentBlock(tools=("calculator",), turn_advantage_weight=1.0)
    assert said(block) == ""
    assert "has no place" in said(block, replace(GRPO, algorithm="reinforce_pp"))
    online = OnlineDPOConfig(model_name_or_path="m", output_dir="o", train_dataset="d", environment=block)
    found = list(environment_problems(online))
    assert any("online_dpo compares single answers" in each for each in found)
    assert any("recipe grpo alone" in each for each in found)


def test_the_list_of_tools_is_the_one_that_runs() -> None:
    from fastrl.train.environment_spec import BUILT_IN

    assert sorted(BUILT_IN) == sorted(BUILT_IN_TOOLS)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (EvalConfig(model_name_or_path="m", eval_dataset="d", environment=OWN), ""),
        (GenerateConfig(model_name_or_path="m", verify=("environment",), environment=OWN), ""),
        (GenerateConfig(model_name_or_path="m", verify=("environment",)), "verify: environment is the reward of"),
        (
            EvalConfig(model_name_or_path="m", eval_dataset="d", environment=replace(OWN, reward_weight=2.0)),
            "eval reports every reward by itself",
        ),
        (GenerateConfig(model_name_or_path="m", environment=replace(OWN, reward_weight=2.0)), "does not name environ"),
        (GenerateConfig(model_name_or_path="m", environment=replace(OWN, turn_gamma=0.5)), "nothing is trained"),
    ],
)
def test_recipes_that_only_sample_have_rules_of_their_own(config: EvalConfig | GenerateConfig, says: str) -> None:
    found = " | ".join(played_problems(config))
    assert says in found
    assert bool(says) == bool(found)


SOURCE = '''
class NoReset:
    def go(self) -> str:
        """Goes."""

class Inherits(NoReset): ...

class Bound:
    reset = NoReset.go

class Untyped:
    def reset(self, **columns): ...
    def go(self, where) -> str:
        """Goes."""

class Replies:
    def reset(self, **columns): ...
    def get_tool_schemas(self): ...
    def go(self, where): ...

def untyped(x, y: int):
    """Does."""

def undocumented(x: int) -> int:
    return x

def factory(x): return NoReset()

@print
def rewritten(x): ...
'''


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [
        ("factory", "NoReset", "NoReset needs a method reset(self, **columns)"),
        ("factory", "Inherits", ""),
        ("factory", "Bound", ""),
        ("factory", "Untyped", "the tool go needs a type for its parameter where"),
        ("factory", "Replies", ""),
        ("factory", "factory(x=1)", ""),
        ("tools", "NoReset", ""),
        ("tools", "untyped", "the tool untyped needs a type for its parameter x"),
        ("tools", "undocumented", "the tool undocumented needs a docstring"),
        ("tools", "factory(x=1)", ""),
        ("tools", "rewritten", ""),
    ],
)
def test_the_source_of_an_environment_tells_without_running(tmp_path: Path, key: str, name: str, says: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    spec = f"{path}:{name}"
    found = said(EnvironmentBlock(factory=spec) if key == "factory" else EnvironmentBlock(tools=(spec,)))
    assert says in found
    assert bool(says) == bool(found)
    assert "|" not in found


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("search", "missing a required argument: 'corpus'"),
        ("search(corpus=gone.jsonl)", "write options as name=value with literal values"),
        ("search(corpus='gone.jsonl')", "needs a corpus that is a JSONL file, got 'gone.jsonl'"),
        ("search(corpus=3)", "got 3"),
        ("search(corpus={0!r}, top_k=0)", "top_k of at least 1, got 0"),
        ("search(corpus={0!r}, top_k='3')", "top_k of at least 1, got '3'"),
        ("search(corpus={0!r}, limit=3)", "unexpected keyword argument 'limit'"),
        ("calculator(digits=3)", "missing a required argument: 'expression'"),
        ("calculator(", "write options as name=value"),
        ("python(second=1)", "unexpected keyword argument 'second'"),
        ("search(corpus={0!r}, top_k=1)", ""),
        ("python(seconds=1)", ""),
        ("calculator()", ""),
    ],
)
def test_a_built_in_tool_that_cannot_be_made_is_a_problem(tmp_path: Path, spec: str, says: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "x"}')
    found = said(EnvironmentBlock(tools=(spec.format(str(corpus)),)))
    assert says in found
    assert bool(says) == bool(found)
