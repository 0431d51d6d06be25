from __future__ import annotations

import pytest

from fastrl.rewards import Reward, check_rewards, constraints

# A says: "B is a knave." B says: "We are both of one kind."
KNIGHTS = ["A == (not B)", "B == (A == B)"]
SUM = ["x + y == 10", "x - y == 2", "all_different(x, y)", "is_integer(x)"]


def judged(text: str, rules: list[str]) -> float:
    return constraints([text], [rules])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A is a knight, B is a knave", 1.0),
        ("A: knight\nB: knave", 1.0),
        ("**A** = knight; **B** = knave", 1.0),
        ('{"A": true, "B": false}', 1.0),
        ("<think>B is a knight</think><answer>A is a knight and B is a knave.</answer>", 1.0),
        ("A is a knave, B is a knight", 0.0),
        ("A is a knight, B is a knight", 0.0),
        ("A is a knight", 0.0),
        ("A is a knight, A is a knave, B is a knave", 0.0),
        ("A is not a knave, B is a knave", 0.0),
        ("A is 1, B is 0", 0.0),
        ("", 0.0),
    ],
)
def test_knights_and_knaves(text: str, value: float) -> None:
    assert judged(text, KNIGHTS) == value


def test_arithmetic_is_exact_and_any_solution_counts() -> None:
    assert [judged(text, SUM) for text in ("x = 6, y = 4", "x=6.0, y=4", "x = 12/2, y = 4")] == [1.0] * 3
    assert [judged(text, SUM) for text in ("x = 5, y = 5", "x = 6.0000001, y = 4", "x = six, y = 4")] == [0.0] * 3
    assert [judged(text, ["a * b == 12", "a > 0"]) for text in ("a = 3, b = 4", "a = 1/2, b = 24")] == [1.0, 1.0]
    assert judged("x = 0", ["1 / x == 1"]) == 0.0


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("1 < x <= 3", True),
        ("x != 3", False),
        ("-x == 0 - 3", True),
        ("x // 2 == 1 and x % 2 == 1", True),
        ("x in (1, 3, 5)", True),
        ("x not in (1, 3)", False),
        ("implies(x == 3, colour == 'red')", True),
        ("implies(x == 4, colour == 'blue')", True),
        ("exactly(1, x == 3, colour == 'blue')", True),
        ("exactly(2, x == 3, colour == 'blue')", False),
        ("x == 1 or colour == 'red'", True),
        ("all_different(x, 3)", False),
        ("x + colour == 3", False),  # meaningless, so not satisfied
        ("x", False),  # a number is not true
    ],
)
def test_every_part_of_the_language(rule: str, holds: bool) -> None:
    assert judged("x = 3, colour = red", [rule, "x == x", "colour == colour"]) == float(holds)


@pytest.mark.parametrize(
    "rule",
    [
        "__import__('os').system('true')",
        "x.__class__",
        "x ** 9 == 1",
        "[y for y in x]",
        "(lambda: x)()",
        "x[0] == 1",
        "f'{x}'",
        "open('a') == x",
        "x = 3",
        "implies(a=x, b=x)",
        "x if x else x",
        "1 == 1",
    ],
)
def test_what_is_outside_the_language_is_refused_before_training(rule: str) -> None:
    with pytest.raises(ValueError, match=r"cannot judge 1 of 1 rows.*constraints"):
        check_rewards([Reward(constraints)], {"constraints": [[rule]]})


def test_no_constraint_would_reward_everything_and_is_refused() -> None:
    for rules in ([], "x == 1", [1]):
        with pytest.raises(ValueError, match="list of at least one text"):
            check_rewards([Reward(constraints)], {"constraints": [rules]})
