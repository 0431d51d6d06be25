from __future__ import annotations

import pytest

from fastrl.rewards import Reward, score
from fastrl.rewards.gates import Gate, check_gates, gated, gates_from

NAMES = ("accuracy", "format", "style")
VALUES = ((1.0, 1.0, None, 1.0), (1.0, 0.0, 1.0, None), (-1.0, -1.0, -1.0, -1.0))


def test_a_gate_leaves_zero_where_its_condition_does_not_hold() -> None:
    counted = gated(VALUES, NAMES, gates_from({"accuracy": "format", "style": "format > 0.5"}))
    assert counted == ((1.0, 0.0, None, 0.0), VALUES[1], (-1.0, 0.0, -1.0, 0.0))
    assert gated(VALUES, NAMES, ()) == VALUES


def test_a_condition_is_read_as_it_was_said_not_as_its_own_gate_leaves_it() -> None:
    gates = gates_from({"format": "style > 0", "accuracy": "format"})
    assert gated(VALUES, NAMES, gates)[:2] == ((1.0, 0.0, None, 0.0), (0.0, 0.0, 0.0, None))


def test_the_sum_and_only_the_sum_sees_the_gate() -> None:
    def accuracy(completions: list[str], **_: object) -> list[float]:
        return [float("4" in text) for text in completions]

    def form(completions: list[str], **_: object) -> list[float]:
        return [float(text.startswith("<")) for text in completions]

    rewards = [Reward(accuracy), Reward(form, weight=0.5)]
    scores = score(rewards, ["?"] * 3, ["<4", "4", "<"], [[1]] * 3, {}, gates=gates_from({"accuracy": "form"}))
    assert scores.total == (1.5, 0.0, 0.5)
    assert scores.values[0] == (1.0, 1.0, 0.0)
    assert scores.counted[0] == (1.0, 0.0, 0.0)
    assert scores.metrics["rewards/accuracy/mean"] == pytest.approx(2 / 3)


def test_conditions_are_written_as_names_or_comparisons() -> None:
    assert gates_from({"a": "b"}) == (Gate("a", "b"),)
    assert gates_from({"a": " tag_count > 0.75 "}) == (Gate("a", "tag_count", 0.75),)
    for text in ("", "a", "a > 1"):
        with pytest.raises(ValueError, match="must name another reward"):
            gates_from({"a": text})


def test_a_gate_on_a_reward_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no reward 'from'; the run has: accuracy, format, style"):
        check_gates(gates_from({"accuracy": "from"}), NAMES)
