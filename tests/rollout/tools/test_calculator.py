from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrl.rollout.tools import calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("7 / 2", "3.5"),
        ("0.1 + 0.2", "0.3"),  # exact, where floats would say 0.30000000000000004
        ("12345678901234567890 * 3", "37037036703703703670"),
        ("2 ** -2", "0.25"),
        ("7 // 2 - 5 % 3", "1"),
        ("-abs(-3)", "-3"),
        ("sqrt(2)", "1.4142135623731"),
        ("1 / 3", "0.333333333333333"),
    ],
)
def test_an_expression_has_its_exact_value(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9",
        "2 ** 10000",
        "1e400",
        "1 / 0",
        "0 ** -1",
        "sqrt(-1)",
        "(-8) ** 0.5",
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "[1][0]",
        "x",
        "True",
        "'a' * 9",
        "1 +",
        "",
        "(" * 300,
        "-" * 120 + "1",
        "1" * 501,
        "exp(1000)",
        "\0",
    ],
)
def test_what_is_no_bounded_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"arithmetic|too large|zero|deep|characters|math"):
        calculator(expression)


@given(st.text(alphabet="0123456789+-*/%(). esqrt", max_size=40))
def test_nothing_but_a_value_or_a_refusal_comes_back(expression: str) -> None:
    try:
        assert calculator(expression)
    except ValueError:
        return
