from __future__ import annotations

import importlib.util
import sys

import pytest

from fastrl.rewards import Reward, check_rewards, reasoning_gym, reasoning_gym_rows, score

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(RuntimeError, match="pip install 'reasoning-gym"):
        reasoning_gym_rows("leg_counting", size=1, seed=0)


@needs_package
def test_the_tasks_own_verifier_judges_the_answer_part():
    rows = reasoning_gym_rows("leg_counting", size=3, seed=7, config={"max_animals": 4})
    assert rows == reasoning_gym_rows("leg_counting", size=3, seed=7, config={"max_animals": 4})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    check_rewards([Reward(reasoning_gym)], columns)
    completions = [f"<think>0</think><answer>{rows[0]['answer']}</answer>", "many", "<think>0"]
    scores = score([Reward(reasoning_gym)], columns["prompt"], completions, [[1]] * 3, columns)
    assert not scores.errors
    assert scores.total[0] == 1.0
    assert scores.total[1] == scores.total[2] < 0.1


@needs_package
def test_an_unknown_task_or_parameter_is_refused():
    with pytest.raises(ValueError, match="refuses the task 'no_such_task'"):
        reasoning_gym_rows("no_such_task", size=1, seed=0)
    with pytest.raises(ValueError, match="refuses the task 'leg_counting'"):
        reasoning_gym_rows("leg_counting", size=1, seed=0, config={"no_such_option": 1})
