"""Rewards are found by name, without importing the modules they live in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastrl.rewards.resolve import BUILT_IN
from fastrl.train.validate_rewards import reward_problem

SOURCE = """
raise RuntimeError("imported")
import json as codec
from math import sqrt
if True:
    def conditional(completions): ...
async def later(completions): ...
class Judge: ...
a, b = 1, 2
_private = 3
"""


@pytest.fixture(autouse=True)
def _modules_that_must_not_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fastrl_probe" / "inner").mkdir(parents=True)
    for path in ("fastrl_probe/__init__.py", "fastrl_probe/inner/__init__.py", "fastrl_probe/inner/mine.py", "mine.py"):
        (tmp_path / path).write_text(SOURCE)
    (tmp_path / "fastrl_folders" / "deep" / "deeper").mkdir(parents=True)  # packages without __init__.py
    (tmp_path / "fastrl_folders" / "deep" / "deeper" / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.parametrize(
    "spec",
    [
        *sorted(BUILT_IN.keys() - {"judge", "reward_model", "process_reward_model"}),  # these need options
        "length(limit=200, start=100)",
        "fastrl_folders.deep.deeper.mine:later",
        "verl:fastrl_probe.inner.mine:later",
        "fastrl_probe.inner.mine:conditional",
        "fastrl_probe:Judge",
        "fastrl_probe:Judge(strict=True)",
        "mine.py:codec",
        "mine.py:sqrt",
        "mine.py:b",
        "json:dumps",
        "math:sqrt",
    ],
)
def test_a_reward_that_exists_has_no_problem_and_is_not_imported(spec: str) -> None:
    assert list(reward_problem(spec)) == []
    assert "fastrl_probe" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("numericc", "reward_funcs: unknown reward 'numericc'. Did you mean 'numeric'?"),
        ("length(limt=2)", "reward_funcs: reward 'length(limt=2)' cannot be made"),
        ("fastrl_probe.inner.yours:f", "reward_funcs: fastrl_probe.inner.yours:f: there is no module"),
        ("fastrl_nowhere.inner:f", "reward_funcs: fastrl_nowhere.inner:f: there is no module 'fastrl_nowhere.inner'"),
        ("a b:f", "reward_funcs: a b:f: there is no module 'a b'"),
        (":f", "reward_funcs: :f: there is no module ''"),
        ("yours.py:f", "reward_funcs: yours.py:f: the file yours.py does not exist"),
        (
            "mine.py:condtional",
            "reward_funcs: mine.py:condtional: mine.py has no condtional; did you mean conditional?",
        ),
        ("mine.py:_private", "reward_funcs: mine.py:_private: mine.py has no _private"),
        ("broken.py:f", "reward_funcs: broken.py:f: broken.py:2: invalid syntax"),
    ],
)
def test_a_reward_that_does_not_exist_is_named(spec: str, problem: str) -> None:
    (found,) = reward_problem(spec)
    assert found.startswith(problem)
    assert "fastrl_probe" not in sys.modules


def test_names_with_commas_get_the_list_that_was_meant() -> None:
    (found,) = reward_problem("numeric,format")
    assert found.endswith("; write a list: reward_funcs: [numeric, format], or --reward_funcs numeric format")
