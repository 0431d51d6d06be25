"""What detectors compute: pure functions from a run's curves and a threshold to what they saw, or None.

    find(curves, limits, threshold) -> Finding or None

They average windows of the log, so that one odd step is no signal. `fastrl.report.signals` lists them with causes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fastrl.report.history import Point

Curves = Mapping[str, Sequence[Point]]

LONG = 5  # windows that a comparison of two rewards looks back


@dataclass(frozen=True, slots=True)
class Limits:
    """What detectors compare with; a configuration's `signals` block, without the actions.

    Attributes:
        thresholds: detector -> threshold; a detector without one is off.
        window: points of a curve that are averaged, so that one odd step is no signal.
        verifier: metric of a held-out judgement that should rise with the reward.
        format_metric: metric of the reward for form.
    """

    thresholds: Mapping[str, float]
    window: int = 10
    verifier: str = "eval/reward"
    format_metric: str = "rewards/format/mean"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a detector saw.

    Attributes:
        value: the number that crossed the threshold.
        since: first step of what was averaged; the fault is at least that old.
        text: a sentence with the numbers.
    """

    value: float
    since: int
    text: str


Find = Callable[[Curves, Limits, float], Finding | None]


def above(metric: str, what: str) -> Find:
    """A detector: the mean of the last window of a metric is above the threshold."""

    def find(curves: Curves, limits: Limits, threshold: float) -> Finding | None:
        recent = _last(curves, metric, limits.window)
        if not recent or _mean(recent) <= threshold:
            return None
        return _finding(recent, f"{what} ({metric}) is {_mean(recent):.3g} over {limits.window} steps")

    return find


def entropy_collapse(curves: Curves, limits: Limits, threshold: float) -> Finding | None:
    recent = _last(curves, "entropy", limits.window)
    first = curves.get("entropy", ())[: limits.window]
    if not recent or recent[0][0] <= first[-1][0] or _mean(first) <= 0:
        return None
    share = _mean(recent) / _mean(first)
    if share >= threshold:
        return None
    text = f"entropy is {_mean(recent):.3g} nats per token, {share:.1%} of the first steps' {_mean(first):.3g}"
    return Finding(share, recent[0][0], text)


def mode_collapse(curves: Curves, limits: Limits, threshold: float) -> Finding | None:
    """Copies in the groups, above the threshold, while the reward is a quarter deviation below its best window."""
    recent = _last(curves, "completions/duplicates", limits.window)
    rewards, spread = curves.get("reward", ()), curves.get("reward_std", ())[: limits.window]
    if not recent or not spread or _mean(recent) <= threshold or len(rewards) < 2 * limits.window:
        return None
    now = _mean(rewards[-limits.window :])
    means = [_mean(rewards[i : i + limits.window]) for i in range(0, len(rewards) - limits.window, limits.window)]
    # A policy that has found the one right answer repeats itself too; its reward is the highest it ever was.
    if now >= max(means) - _mean(spread) / 4:
        return None
    text = f"{_mean(recent):.0%} of completions repeat one of their group; reward {now:.3g} has been {max(means):.3g}"
    return _finding(recent, text)


def sparse_reward(curves: Curves, limits: Limits, threshold: float) -> Finding | None:
    recent = _last(curves, "frac_reward_zero_std", limits.window)
    if not recent:
        return None
    waste = _last(curves, "dynamic_sampling/waste", limits.window)
    # Dynamic sampling replaces groups without signal: they are in the waste and no longer in the share.
    share = 1 - (1 - _mean(recent)) * (1 - _mean(waste) if waste else 1)
    if share <= threshold:
        return None
    return Finding(share, recent[0][0], f"{share:.0%} of groups have equal rewards over {limits.window} steps")


def reward_hacking(curves: Curves, limits: Limits, threshold: float) -> Finding | None:
    """The training reward rose by `threshold` of its deviation, the verifier by less than a tenth of that rise."""
    judged = curves.get(limits.verifier, ())[-LONG * limits.window :]
    if len(judged) < 4:
        return None
    early, late = judged[: len(judged) // 2], judged[len(judged) // 2 :]
    before, after = (_between(curves.get("reward", ()), half) for half in (early, late))
    spread = _between(curves.get("reward_std", ()), judged)
    if not before or not after or not spread or _mean(spread) <= 0:
        return None
    gain, verified = _mean(after) - _mean(before), _mean(late) - _mean(early)
    value = gain / _mean(spread)
    if value <= threshold or verified > gain / 10:
        return None
    text = (
        f"reward went from {_mean(before):.3g} to {_mean(after):.3g}, "
        f"{limits.verifier} from {_mean(early):.3g} to {_mean(late):.3g}"
    )
    return Finding(value, late[0][0], text)


def format_hacking(curves: Curves, limits: Limits, threshold: float) -> Finding | None:
    """The reward for form rose by the threshold, and no other reward by a tenth of that."""
    form = curves.get(limits.format_metric, ())[-LONG * limits.window :]
    others = [
        name
        for name in curves
        if name.startswith("rewards/") and name.endswith("/mean") and name != limits.format_metric
    ]
    if len(form) < 2 * limits.window or not others:
        return None
    gain = _rise(form)
    rises = {name: _rise(points) for name in others if len(points := _between(curves[name], form)) >= 2}
    if gain <= threshold or not rises or max(rises.values()) > gain / 10:
        return None
    best = max(rises, key=lambda name: rises[name])
    text = f"{limits.format_metric} rose by {gain:.3g}, and no other reward did; {best} changed by {rises[best]:+.3g}"
    return Finding(gain, form[len(form) // 2][0], text)


def reward_errors(curves: Curves, limits: Limits, threshold: float) -> Finding | None:
    rates = {
        name: recent
        for name in curves
        if name.startswith("rewards/")
        and name.endswith("/error_rate")
        and (recent := _last(curves, name, limits.window))
    }
    worst = max(rates, key=lambda name: _mean(rates[name]), default=None)
    if worst is None or _mean(rates[worst]) <= threshold:
        return None
    return _finding(rates[worst], f"{worst} is {_mean(rates[worst]):.1%} over {limits.window} steps")


def _finding(points: Sequence[Point], text: str) -> Finding:
    return Finding(_mean(points), points[0][0], text)


def _last(curves: Curves, name: str, window: int) -> Sequence[Point]:
    """The last window of a curve; nothing while the curve is shorter."""
    curve = curves.get(name, ())
    return curve[-window:] if len(curve) >= window else ()


def _between(points: Sequence[Point], others: Sequence[Point]) -> list[Point]:
    """The points within the steps of others."""
    return [point for point in points if others[0][0] <= point[0] <= others[-1][0]]


def _rise(points: Sequence[Point]) -> float:
    """Mean of the later half less that of the earlier half."""
    half = len(points) // 2
    return _mean(points[half:]) - _mean(points[:half])


def _mean(points: Sequence[Point]) -> float:
    return fmean(value for _, value in points)
