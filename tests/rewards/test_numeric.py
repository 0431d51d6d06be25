from __future__ import annotations

import json
import time
from fractions import Fraction

import pytest

from fastrl.rewards.numeric import gold_number, number_in, numbers_agree, numeric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # declared answers, in order of precedence; the last of a kind wins
        ("3 + 4 = 7\n#### 7", 7),
        ("#### 1\n#### 2\n\\boxed{3} The answer is 4. 5", 2),
        ("\\boxed{3} then \\boxed{4}. The answer is 5, of 6", 4),
        ("The answer is 5. Answer: 6. Page 9", 6),
        ("She has 3 and gets 4, so 7 apples.", 7),
        ("#### **$1,234.50**", Fraction(2469, 2)),
        ("#### 1. Compute the total\n#### 2) Add\nIt is 18.", 18),  # headings
        ("#### 18.\n", 18),
        ("**Final answer:** $18$", 18),
        ("the answer is: \\(18\\)", 18),
        ("The answer is the sum of 3 and 4: 7", 7),
        # boxes
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{x = 18\\text{ dollars}}", 18),
        ("\\boxed{\\text{18 eggs}}", 18),
        ("\\boxed{2x+5}", None),
        ("7 \\boxed{no}", None),
        ("so 7, \\boxed{18", 18),  # a truncated box: the last number
        ("\\boxed{\\boxed{4}}", 4),
        # ways to write a number
        ("1,234,567", 1234567),
        ("1{,}234", 1234),
        ("1\\,234", 1234),
        ("1,2,3", 3),
        ("1,2345", 2345),
        (".5", Fraction(1, 2)),
        ("it costs $18.50.", Fraction(37, 2)),
        ("25%", 25),
        ("25\\%", 25),
        ("3/4", Fraction(3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1\\frac{1}{2}", Fraction(3, 2)),
        ("-\\dfrac{1}{2}", Fraction(-1, 2)),
        ("1.5e3", 1500),
        ("2E-2", Fraction(1, 50)),
        ("3 \\times 10^{5}", 300000),
        ("3 \N{MULTIPLICATION SIGN} 10^-2", Fraction(3, 100)),
        ("3*10 = 30", 30),
        ("12/60 = 0.2", Fraction(1, 5)),
        # signs
        ("-5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("$-5", -5),
        ("-$5", -5),
        ("+5", 5),
        ("5-3", 3),
        ("5 - 3", 3),
        ("pages 3-5", 5),
        ("- 5 apples", 5),
        ("x=-5", -5),
        # no number
        ("", None),
        ("none", None),
        ("3/0", None),
        ("<think>18", None),
        ("9" * 101, None),
        ("<think>17</think>18", 18),
        ("²", None),
    ],
)
def test_the_number_a_text_gives(text, number):
    assert number_in(text) == number


def test_integers_agree_exactly_and_others_within_a_millionth():
    assert numbers_agree(Fraction(5_000_000), Fraction(5_000_000))
    assert not numbers_agree(Fraction(5_000_001), Fraction(5_000_000))
    assert numbers_agree(Fraction("0.333333"), Fraction(1, 3))
    assert not numbers_agree(Fraction("0.33333"), Fraction(1, 3))
    assert not numbers_agree(Fraction(-18), Fraction(18))
    assert numbers_agree(Fraction("0.0"), Fraction(0))
    assert not numbers_agree(None, Fraction(0))


def test_a_completion_without_a_number_is_wrong():
    assert numeric(["I do not know", "0"], ["0", "0"]) == [0.0, 1.0]


def test_gold_may_be_a_number_or_a_worked_solution():
    assert numeric(["18", "0.1", [{"role": "assistant", "content": "18"}]], [18, 0.1, "9 * 2 = 18\n#### 18"]) == [
        1,
        1,
        1,
    ]


@pytest.mark.parametrize("gold", ["none", None, True, [18], float("nan"), float("inf"), "#### x", ""])
def test_gold_without_a_number_is_refused(gold):
    with pytest.raises(ValueError, match="needs an answer with a number in it"):
        gold_number(gold)


def test_hostile_text_costs_linear_time():
    n = 20_000
    hostile = ["\\boxed{" * n, "1," * n, "1,111" * n, "1" * n, "1 " * n, "{" * n, "\\frac{1" * n, "answer " * n]
    hostile += ["answer" + " " * n, "####" * n, "1e999 " * 1000, "<<" * n, "-" * n, "1/" * n, "1 1/" * n]
    start = time.process_time()
    for text in hostile:
        number_in(text)
    assert time.process_time() - start < 5.0


def test_every_gold_answer_of_gsm8k_agrees_with_itself_and_with_a_plain_reading(shared_data):
    with (shared_data / "gsm8k" / "train.jsonl").open() as file:
        gold = [json.loads(line)["answer"] for line in file]
    assert len(gold) == 7473
    assert numeric(gold, gold) == [1.0] * 7473
    plain = [text.split("#### ")[1].replace(",", "") for text in gold]
    assert [gold_number(text) for text in gold] == [Fraction(text) for text in plain]


def test_real_model_solutions_are_judged_as_the_dataset_judged_them(shared_data):
    completions, gold, is_correct = [], [], []
    with (shared_data / "gsm8k" / "model_solutions_part1.jsonl").open() as file:
        for line in file:
            row = json.loads(line)
            for solution in (value for value in row.values() if isinstance(value, dict)):
                completions.append(solution["solution"])
                gold.append(row["ground_truth"])
                is_correct.append(float(solution["is_correct"]))
    assert len(completions) == 2640
    assert 500 < sum(is_correct) < 2140
    assert numeric(completions, gold) == is_correct
