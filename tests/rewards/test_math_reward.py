from __future__ import annotations

import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from fastrl.rewards import Reward, RewardWorkers, math_reward, score
from fastrl.rewards.math_reward import math_gold, plain_number

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("x = 18", 18),
        ("\\$1{,}234.50", Fraction(2469, 2)),
        ("$1,234", 1234),
        ("$18$", 18),
        ("**18**", 18),
        ("18.", 18),
        ("18 dollars", 18),
        ("18\\text{ cm}", 18),
        ("\\text{18 eggs}", 18),
        ("5 m", 5),
        ("5 \\mathrm{m}", 5),
        ("25\\%", 25),
        ("90^\\circ", 90),
        ("-3", -3),
        ("1\\frac{1}{2}", Fraction(3, 2)),
        ("5m", None),
        ("2x", None),
        ("x^2", None),
        ("1, 2", None),
        ("2\\sqrt{3}", None),
        ("3:45", None),
        ("m", None),
        ("", None),
        ("1" * 501, None),
    ],
)
def test_a_text_that_is_nothing_but_a_number_gives_it(text, number):
    assert plain_number(text) == number


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("#### 1,234", "so many.\n#### 1234"),
        ("\\boxed{9\\cdot 2}", "18"),
        ("\\boxed{\\frac12}", 0.5),
        ("\\boxed{2^{10}}", 1024),
        ("The answer is $2\\sqrt{4}$.", "4"),
        ("The answer is 18 dollars, because 9 * 2 = 18.", "18"),
        ("it weighs 5 kg", "5"),
        ("<think>17</think>\\boxed{18\\text{ dollars}}", "9 * 2 = 18\nA: 18"),
        ("\\boxed{x^2+2x+1}", "(x+1)^2"),
        ("\\boxed{\\{2,1\\}}", "\\{1,2\\}"),
        ("\\boxed{[0,1)}", "[0,1)"),
        ("so it is $\\frac{\\sqrt{3}}{2}$", "\\frac{\\sqrt{3}}{2}"),
        ("\\boxed{0.75}", "\\frac{3}{4}"),
        ([{"role": "assistant", "content": "\\boxed{\\pi}"}], "\\pi"),
    ],
)
def test_answers_that_are_mathematically_the_gold_score_one(completion, gold):
    assert math_reward([completion], [gold]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("", "0"),
        ("I do not know.", "0"),
        ("\\boxed{}", "0"),
        ("<think>18", "18"),
        ("\\boxed{18.1}", "18"),
        ("\\boxed{2x}", "2"),
        ("\\boxed{x^2}", "2"),
        ("\\boxed{2e-7}", "1e-7"),  # math-verify alone rounds to six decimals
        ("\\boxed{25\\%}", "0.25"),
        ("\\boxed{17 \\text{ or } 18}", "18"),
        ("\\boxed{\\{17, 18\\}}", "18"),
        ("\\boxed{(2,1)}", "(1,2)"),
        ("\\boxed{[0,1]}", "[0,1)"),
        ("\\boxed{x^2+2x}", "(x+1)^2"),
        ("\\boxed{" + "1+" * 400 + "1}", "401"),
    ],
)
def test_answers_that_are_not_the_gold_score_zero(completion, gold):
    assert math_reward([completion], [gold]) == [0.0]


@pytest.mark.parametrize("gold", ["Paris", "", None, True, float("nan"), "no number\nhere"])
def test_gold_that_is_no_mathematics_is_refused(gold):
    with pytest.raises(ValueError, match="answer"):
        math_gold(gold)


def test_a_formula_that_never_ends_costs_its_item_alone():
    tower = "\\boxed{9^{9^{9^{9^{9}}}}+x}"
    with RewardWorkers(workers=2, timeout_seconds=3.0) as workers:
        completions, answers = ["\\boxed{18}", tower, "\\boxed{17}"], ["18", "9^{9^{9^{9^{9}}}}+2x", "18"]
        start = time.monotonic()
        scores = score([Reward(math_reward)], ["p"] * 3, completions, [[1]] * 3, {"answer": answers}, workers=workers)
    assert (scores.total[0], scores.total[2]) == (1.0, 0.0)
    assert scores.total[1] in (0.0, None)  # as fast as the package is today
    assert time.monotonic() - start < 60


def test_without_the_package_numbers_are_judged_and_formulas_name_the_remedy():
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["math_verify"] = None
from fastrl.rewards import math_reward
assert math_reward(["#### 18"], ["18"]) == [1.0]
math_reward(["\\\\boxed{{2+x}}"], ["x+2"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "RuntimeError: math_reward needs a package for formulas: pip install 'math-verify>=0.8'" in result.stderr


def test_every_gold_answer_of_gsm8k_scores_one(shared_data):
    with (shared_data / "gsm8k" / "train.jsonl").open() as file:
        gold = [json.loads(line)["answer"] for line in file]
    assert len(gold) == 7473
    assert math_reward(gold, gold) == [1.0] * 7473
    boxed = ["So \\boxed{" + text.split("#### ")[1] + "}" for text in gold]
    assert math_reward(boxed, gold) == [1.0] * 7473
    shifted = [str(math_gold(text) + 1) for text in gold]
    assert math_reward(shifted, gold) == [0.0] * 7473


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
    assert math_reward(completions, gold) == is_correct
