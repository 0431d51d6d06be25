"""Every detector fires on a run that shows its fault and stays silent on a healthy one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastrl.report.detect import Limits
from fastrl.report.history import KEPT_FIRST, KEPT_LAST, History
from fastrl.report.signals import DETECTORS, Signal, is_due, signals_in

LIMITS = Limits({name: detector.threshold for name, detector in DETECTORS.items()})
STEPS = 100


def healthy(step: int) -> dict[str, float]:
    """Step of a run that learns: reward and held-out verifier rise together, everything else stays in range."""
    progress, wiggle = step / STEPS, 0.01 * (-1) ** step
    line = {
        "reward": 0.6 * progress + 0.2 + wiggle,
        "reward_std": 0.4,
        "rewards/format/mean": 0.5 + 0.4 * progress,
        "rewards/accuracy/mean": 0.2 + 0.4 * progress + wiggle,
        "rewards/accuracy/error_rate": 0.0,
        "rewards/correlation/reward/length": 0.2 + wiggle,
        "kl": 0.1 * progress,
        "entropy": 0.8 - 0.5 * progress,
        "completions/duplicates": 0.3 * progress,
        "frac_reward_zero_std": 0.3,
        "dynamic_sampling/waste": 0.0,
        "clip_ratio/region_mean": 0.02,
        "ratio_tail": 0.001,
    }
    return line | ({"eval/reward": 0.15 + 0.6 * progress} if step % 10 == 0 else {})


def fired(run: Callable[[int], dict[str, float]], limits: Limits = LIMITS) -> dict[str, Signal]:
    """The first signal of each detector over a run, looking after every step."""
    history, first = History(), dict[str, Signal]()
    for step in range(1, STEPS + 1):
        history.add(step, run(step))
        for signal in signals_in(history.curves, limits, step=step):
            first.setdefault(signal.name, signal)
    return first


def with_fault(**fault: Callable[[float], float]) -> Callable[[int], dict[str, float]]:
    """The healthy run with some metrics replaced from its middle on; each is given how far that is, in (0, 1]."""

    def run(step: int) -> dict[str, float]:
        line = healthy(step)
        if step <= STEPS // 2:
            return line
        replaced = {name.replace("__", "/"): value(2 * step / STEPS - 1) for name, value in fault.items()}
        return {name: replaced.get(name, value) for name, value in line.items()}

    return run


FAULTS: dict[str, dict[str, Callable[[float], float]]] = {
    "kl_blowup": {"kl": lambda x: 0.1 + 5 * x},
    "entropy_collapse": {"entropy": lambda x: 0.5 * (1 - x) ** 2 if x < 0.4 else 0.01},
    "mode_collapse": {"completions__duplicates": lambda x: 0.98, "reward": lambda x: 0.3},
    "sparse_reward": {"frac_reward_zero_std": lambda x: 0.97},
    "reward_hacking": {"reward": lambda x: 0.5 + x, "eval__reward": lambda x: 0.44 - 0.2 * x},
    "length_hacking": {"rewards__correlation__reward__length": lambda x: 0.9},
    "format_hacking": {"rewards__format__mean": lambda x: 0.7 + x, "rewards__accuracy__mean": lambda x: 0.4},
    "clip_tail": {"clip_ratio__region_mean": lambda x: 0.5},
    "ratio_tail": {"ratio_tail": lambda x: 0.2},
    "reward_errors": {"rewards__accuracy__error_rate": lambda x: 0.1},
}


def test_every_detector_has_a_fault_here() -> None:
    assert FAULTS.keys() == DETECTORS.keys()


def test_all_are_silent_on_a_healthy_run() -> None:
    assert fired(healthy) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fires_on_its_own_fault_and_the_others_do_not(name: str) -> None:
    first = fired(with_fault(**FAULTS[name]))
    assert set(first) == {name}
    signal = first[name]
    assert STEPS // 2 < signal.step <= STEPS
    assert signal.since <= signal.step
    assert signal.text
    assert DETECTORS[name].causes


def test_a_plateau_of_the_verifier_alone_is_no_hacking() -> None:
    both = with_fault(reward=lambda x: 0.5, eval__reward=lambda x: 0.45)
    assert "reward_hacking" not in fired(both)


def test_a_policy_that_repeats_the_right_answer_has_not_collapsed() -> None:
    solved = with_fault(completions__duplicates=lambda x: 1.0, reward=lambda x: 1.0, eval__reward=lambda x: 1.0)
    assert fired(solved) == {}


def test_groups_that_dynamic_sampling_replaced_count_as_sparse() -> None:
    replaced = with_fault(frac_reward_zero_std=lambda x: 0.0, dynamic_sampling__waste=lambda x: 0.95)
    assert set(fired(replaced)) == {"sparse_reward"}


def test_one_odd_step_is_no_signal() -> None:
    def run(step: int) -> dict[str, float]:
        return healthy(step) | ({"kl": 5.0, "clip_ratio/region_mean": 1.0} if step == 60 else {})

    assert fired(run) == {}


def test_a_detector_without_a_threshold_is_off_and_another_verifier_can_be_named() -> None:
    quiet = Limits({name: value for name, value in LIMITS.thresholds.items() if name != "kl_blowup"})
    assert fired(with_fault(**FAULTS["kl_blowup"]), quiet) == {}
    hacked = with_fault(reward=lambda x: 0.5 + x, rewards__accuracy__mean=lambda x: 0.3)
    assert "reward_hacking" not in fired(hacked)
    named = Limits(LIMITS.thresholds, verifier="rewards/accuracy/mean")
    assert "reward_hacking" in fired(hacked, named)


def test_a_signal_is_news_once_a_window_and_again_after_its_steps_were_taken_back() -> None:
    signal = Signal("kl_blowup", 50, 41, 2.0, 1.0, "")
    assert is_due(signal, None, window=10)
    assert [is_due(signal, last, window=10) for last in (50, 41, 40, 60)] == [False, False, True, True]


def test_a_long_history_keeps_its_beginning_and_its_recent_past() -> None:
    history = History()
    n = 3 * (KEPT_FIRST + KEPT_LAST)
    for step in range(n):
        bad: dict[str, Any] = {"loss": float(step), "lost": None, "broken": float("nan")}
        history.add(step, bad)
    curve = history.curves["loss"]
    assert set(history.curves) == {"loss"}
    assert curve[:KEPT_FIRST] == [(step, float(step)) for step in range(KEPT_FIRST)]
    assert [step for step, _ in curve[-KEPT_LAST:]] == list(range(n - KEPT_LAST, n))
    assert len(curve) <= 2 * (KEPT_FIRST + KEPT_LAST)
