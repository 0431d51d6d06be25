from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fastrl.rewards import Reward, check_rewards, exact_match, math_reward, numeric, verifier_gate
from fastrl.rewards.verifier_gate import check_verifiers


def test_verifiers_of_good_rows_pass():
    columns = {"answer": ["18", "x = 3\n#### 3", "1/2"]}
    check_verifiers([Reward(numeric), Reward(math_reward), Reward(exact_match)], columns)
    check_verifiers([Reward(math_reward)], {"answer": ["(x+1)^2", "\\frac{\\sqrt{3}}{2}", 7]})


def test_rewards_without_references_are_not_asked():
    def broken(completions, **_):
        raise AssertionError

    check_verifiers([Reward(broken)], {})


def test_a_row_that_an_empty_solution_solves_is_listed():
    with pytest.raises(ValueError, match="is no verifier for 1 of 2 rows") as error:
        check_rewards([Reward(exact_match)], {"answer": ["18", ""]})
    assert "row 2: the empty solution '' scores 1.0" in str(error.value)


def test_a_row_whose_own_answer_does_not_pass_is_listed():
    with pytest.raises(ValueError, match="row 1: its reference solution scores 0"):
        check_rewards([Reward(partial(exact_match))], {"answer": ["<answer>18</answer>"]})


def test_a_verifier_that_says_yes_to_everything_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def yes(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    references: tuple[tuple[Callable[..., Any], Callable[[object], str]], ...] = ((yes, str),)
    monkeypatch.setattr(verifier_gate, "_REFERENCES", references)
    with pytest.raises(ValueError, match="is no verifier for 30 of 30 rows") as error:
        check_verifiers([Reward(yes)], {"answer": ["1"] * 30})
    assert len(str(error.value).splitlines()) == 1 + verifier_gate.MOST_LISTED
