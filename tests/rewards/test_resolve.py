from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from fastrl.rewards import (
    Length,
    Reward,
    check_rewards,
    numeric,
    resolve_reward,
    resolve_rewards,
    score,
    think_format,
    verl_reward,
)

FILE = """
def brevity(completions, **_):
    return [-len(c) for c in completions]

class Scaled:
    def __init__(self, factor=1.0):
        self.factor = factor
    def __call__(self, completions, **_):
        return [self.factor * len(c) for c in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str == ground_truth)

CONSTANT = 3
"""


@pytest.fixture
def rewards_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_names_resolve_to_built_in_rewards():
    assert resolve_reward("numeric") is numeric
    assert resolve_reward("format") is think_format
    assert resolve_reward("length") == Length()
    assert resolve_reward("length(limit=200, start=100)") == Length(start=100, limit=200)


def test_functions_come_from_modules_and_files(rewards_file):
    assert resolve_reward("fastrl.rewards.numeric:numeric") is numeric
    brevity = resolve_reward(f"{rewards_file}:brevity")
    assert brevity(["abc"]) == [-3]
    assert resolve_reward(f"{rewards_file}:brevity") is brevity
    assert pickle.loads(pickle.dumps(brevity)) is brevity
    assert resolve_reward(f"{rewards_file}:Scaled(factor=0.5)")(["abcd"]) == [2.0]
    assert resolve_reward(f"{rewards_file}:Scaled")(["abcd"]) == [4.0]
    assert resolve_reward(f"verl:{rewards_file}:compute_score")(["a"], ground_truth=["a"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("numerics", "unknown reward 'numerics'. Did you mean 'numeric'"),
        ("think_format", "Did you mean 'format'"),
        ("zzz", "unknown reward 'zzz'. Built in: numeric, exact_match"),
        ("no.such.module:f", "the reward module 'no.such.module' cannot be imported"),
        ("no/such/file.py:f", "the reward file no/such/file.py does not exist"),
        ("fastrl.rewards.numeric:numerc", "has no 'numerc'; did you mean 'numeric'"),
        ("fastrl.rewards.numeric:RELATIVE_TOLERANCE", "is not a function but Fraction"),
        ("length(limit)", "write options as name=value"),
        ("length(limit=2", "write options as name=value"),
        ("length(limit=open('x'))", "write options as name=value"),
        ("length(limt=2)", "cannot be made: .*unexpected keyword argument 'limt'"),
        ("length(start=9, limit=3)", "0 <= start < limit"),
        ("numeric(tolerance=1)", "cannot be made"),
    ],
)
def test_a_spec_that_names_nothing_is_one_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        resolve_reward(spec)


def test_rewards_get_short_names_and_weights(rewards_file):
    specs = ["numeric", "format", "length(limit=8)", "length(limit=9)", f"{rewards_file}:brevity"]
    rewards = resolve_rewards(specs, [1, 0.5, 0.1, 0.2, 0])
    assert [reward.name for reward in rewards] == ["numeric", "format", "length", "length(limit=9)", "brevity"]
    assert [reward.weight for reward in rewards] == [1, 0.5, 0.1, 0.2, 0]
    assert [reward.weight for reward in resolve_rewards(["numeric"])] == [1.0]
    assert score(rewards[2:4], ["p"], ["abcd"], [[1] * 9], {}).total == pytest.approx((-0.3,))


def test_counts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one number per reward: 2, got 1"):
        resolve_rewards(["numeric", "format"], [1.0])
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        resolve_rewards([])


def test_a_missing_column_is_found_before_training():
    with pytest.raises(ValueError, match=r"needs the column 'answer'; the data has: question, solution\. Rename"):
        check_rewards([Reward(numeric)], {"question": ["?"], "solution": ["1"]})
    check_rewards([Reward(think_format), Reward(numeric)], {"answer": ["#### 1", 2]})
    check_rewards([Reward(Length())], {})


def test_gold_that_cannot_be_judged_is_found_before_training():
    with pytest.raises(ValueError, match=r"cannot judge 2 of 4 rows; the first is row 2: .*got 'many'"):
        check_rewards([Reward(numeric)], {"answer": ["1", "many", "2", None]})
    with pytest.raises(ValueError, match="cannot judge 1 of 1 rows"):
        check_rewards(resolve_rewards(["exact_match"]), {"answer": [None]})


def test_resolving_does_not_import_torch():
    code = "import sys, fastrl.rewards as r; r.resolve_rewards(['numeric', 'length']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_verl_reward_without_verls_columns_is_refused_before_training() -> None:
    reward = Reward(verl_reward(lambda data_source, solution_str, ground_truth, extra_info: 1.0))
    check_rewards([reward], {"ground_truth": ["1"]})
    check_rewards([reward], {"reward_model": [{"ground_truth": "1"}]})
    with pytest.raises(ValueError, match="needs the column 'ground_truth'"):
        check_rewards([reward], {"answer": ["1"]})


def test_a_reward_that_exits_is_a_counted_failure() -> None:
    def leaves(completions: list[str], **columns: object) -> list[float]:
        raise SystemExit(75)

    found = score([Reward(leaves)], ["p"], ["c"], [[1]], {})
    assert (found.total, found.errors["leaves"].count) == ((None,), 1)
    assert "SystemExit: 75" in found.errors["leaves"].first
