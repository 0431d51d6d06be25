"""The last fenced code block, judged by the row's tests."""

from __future__ import annotations

import json
import shutil

import pytest

from fastrl.rewards import CodeReward, Reward, check_rewards, code_reward, resolve_reward, score
from fastrl.rewards.code_reward import last_code_block, parsed_tests
from fastrl.rewards.sandbox import CallTest, ScriptTest, StdinTest, default_sandbox

TESTS = [{"entry_point": "double", "args": [n], "expected": 2 * n} for n in (0, 3)]
GOOD = "Think.\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
HALF = "```\ndef double(x):\n    return 0\n```"


@pytest.fixture
def working_sandbox() -> None:
    if not shutil.which("bwrap"):
        pytest.skip("needs bubblewrap: apt-get install bubblewrap")
    default_sandbox()


def test_the_last_closed_block_of_python_or_no_language_is_the_code() -> None:
    assert last_code_block(GOOD) == "def double(x):\n    return 2 * x\n"
    assert last_code_block("```py\n1\n```\nor\n```\n2\n```\n```text\n3\n```") == "2\n"
    assert last_code_block("```python\nx = '```'\n```") == "x = '```'\n"
    assert last_code_block("<think>```python\n1\n```</think> none") is None
    assert last_code_block("<think>```python\n1\n```") is None
    assert last_code_block("```python\nnever closed") is None
    assert last_code_block("x = 1") is None


def test_right_wrong_and_absent_code(working_sandbox: None) -> None:
    completions = [GOOD, HALF, "no code", [{"role": "assistant", "content": GOOD}]]
    assert code_reward(completions, [TESTS] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert CodeReward(partial=True)(completions, [json.dumps(TESTS)] * 4) == [1.0, 0.5, 0.0, 1.0]


def test_a_test_that_is_broken_is_an_error_of_its_item_and_no_reward(working_sandbox: None) -> None:
    broken = [{"entry_point": "double", "script": "import os; os._exit(0)"}]
    scores = score([Reward(code_reward)], ["p"] * 2, [GOOD] * 2, [[1]] * 2, {"tests": [broken, TESTS]})
    assert scores.total == (None, 1.0)
    assert scores.errors["code"].count == 1
    assert "the sandbox gave no verdict" in scores.errors["code"].first


def test_rows_become_tests() -> None:
    rows = [{"stdin": "1", "stdout": "2", "script": None}, TESTS[1], {"entry_point": "f", "script": "f()"}]
    rows.append({"entry_point": "f", "args": [], "expected": 1.0, "tolerance": 0.1, "is_unordered": True})
    assert parsed_tests(json.dumps(rows)) == [
        StdinTest("1", "2"),
        CallTest("double", (3,), 6),
        ScriptTest("f", "f()"),
        CallTest("f", (), 1.0, tolerance=0.1, is_unordered=True),
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("[", "no JSON"),
        ("[]", "at least one"),
        ([1], "at least one"),
        (None, "at least one"),
        ([{"stdin": "1"}], "has the keys stdin; it needs"),
        ([{"stdin": "1", "stdout": "2", "extra": 1}], "has the keys stdin, stdout, extra"),
        ([{"stdin": "1", "stdout": ""}], "stdout is empty"),
        ([{"entry_point": "f", "args": [], "expected": None}], "is None"),
    ],
)
def test_bad_tests_are_refused(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed_tests(raw)


def test_bad_rows_are_found_before_training(working_sandbox: None) -> None:
    reward = resolve_reward("code(seconds=5, partial=True)")
    assert reward == CodeReward(seconds=5, partial=True)
    with pytest.raises(
        ValueError, match=r"reward 'code' cannot judge 1 of 2 rows; the first is row 2: stdout is empty"
    ):
        check_rewards([Reward(reward)], {"tests": [TESTS, [{"stdin": "1", "stdout": ""}]]})
    with pytest.raises(ValueError, match="needs the column 'tests'"):
        check_rewards([Reward(reward)], {"answer": ["1"]})
