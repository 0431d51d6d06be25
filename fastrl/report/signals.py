"""Detectors: small pure functions over a run's curves that say when training looks wrong, and what may be the cause.

    find(curves, limits) -> Finding or None

They audit: each looks at what has been logged for a while and compares it with a threshold. A signal is a reason to
read completions, no proof of a fault, and a run without one may be faulty. None of them warns early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastrl.report.detect import (
    Curves,
    Find,
    Limits,
    above,
    entropy_collapse,
    format_hacking,
    mode_collapse,
    reward_errors,
    reward_hacking,
    sparse_reward,
)


@dataclass(frozen=True, slots=True)
class Detector:
    """A fault that can be seen in the metrics.

    Attributes:
        name: in configuration, log and report.
        threshold: by default.
        find: `(curves, limits, threshold) -> Finding | None`.
        needs: metrics without any of which it stays silent.
        causes: what to look for, the likeliest first.
    """

    name: str
    threshold: float
    find: Find = field(repr=False)
    needs: tuple[str, ...]
    causes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Signal:
    """A detector that fired.

    Attributes:
        name: of the detector.
        step: of the last line of the log that it saw.
        since, value, text: see `Finding`.
        threshold: what was crossed.
    """

    name: str
    step: int
    since: int
    value: float
    threshold: float
    text: str


def signals_in(curves: Curves, limits: Limits, *, step: int) -> list[Signal]:
    """Every detector that has a threshold, on the curves as they are after a step."""
    found = []
    for name, threshold in limits.thresholds.items():
        finding = DETECTORS[name].find(curves, limits, threshold)
        if finding is not None:
            found.append(Signal(name, step, finding.since, finding.value, threshold, finding.text))
    return found


def is_due(signal: Signal, last_step: int | None, *, window: int) -> bool:
    """Whether a signal is news: the detector has not fired in the last `window` steps. A later step was taken back."""
    return last_step is None or not 0 <= signal.step - last_step < window


DETECTORS: Mapping[str, Detector] = {
    detector.name: detector
    for detector in (
        Detector(
            "kl_blowup",
            1.0,
            above("kl", "KL to the reference, nats per token"),
            ("kl",),
            (
                "the learning rate is too high",
                "beta is too small for this reward",
                "the reward pays for text the reference would never write: read completions of high reward",
                "the reference is not the model that the policy started from",
            ),
        ),
        Detector(
            "entropy_collapse",
            0.1,
            entropy_collapse,
            ("entropy",),
            (
                "the policy has become certain: of the right answer (then stop here), or of one habit",
                "the upper clip range is tight: try epsilon_high 0.28, or entropy_coef",
                "the prompts are too easy or too few, and are being memorised",
            ),
        ),
        Detector(
            "mode_collapse",
            0.9,
            mode_collapse,
            ("completions/duplicates", "reward", "reward_std"),
            (
                "the policy repeats one answer whatever is asked, often after entropy collapsed",
                "temperature, top_p or top_k leave sampling little choice",
                "a reward pays for one phrase",
            ),
        ),
        Detector(
            "sparse_reward",
            0.9,
            sparse_reward,
            ("frac_reward_zero_std",),
            (
                "prompts are too hard (reward near its lowest) or too easy (near its highest): choose others",
                "the verifier cannot read the completions: look at its input in completions.jsonl",
                "num_generations is too small for such rare successes",
            ),
        ),
        Detector(
            "reward_hacking",
            0.5,
            reward_hacking,
            ("reward", "reward_std"),
            (
                "completions please the reward and not the verifier: read those of highest reward",
                "a learned reward is asked about text unlike its training data: raise the KL, or retrain it",
                "the policy has learnt the training prompts by heart",
            ),
        ),
        Detector(
            "length_hacking",
            0.7,
            above("rewards/correlation/reward/length", "correlation of reward with length"),
            ("rewards/correlation/reward/length",),
            (
                "a learned reward or judge prefers long answers",
                "short completions are cut off or empty, so that only long ones can be right",
                "the weights of a length reward are too large",
            ),
        ),
        Detector(
            "format_hacking",
            0.2,
            format_hacking,
            ("rewards/format/mean",),
            (
                "form is easier to learn than the task, and pays as much: lower its weight, or gate it",
                "completions have the tags and nothing useful between them",
                "the task is too hard: no completion is right yet",
            ),
        ),
        Detector(
            "clip_tail",
            0.3,
            above("clip_ratio/region_mean", "share of tokens whose ratio is clipped"),
            ("clip_ratio/region_mean",),
            (
                "the learning rate is too high for so many updates of one batch",
                "num_iterations or steps_per_generation is too large",
                "sampler and trainer disagree: see sampling/probability_error",
            ),
        ),
        Detector(
            "ratio_tail",
            0.05,
            above("ratio_tail", "share of tokens whose probability halved or doubled since sampling"),
            ("ratio_tail",),
            (
                "the learning rate is too high for so many updates of one batch",
                "num_iterations or steps_per_generation is too large: set target_kl",
                "the sampler runs an older policy than was thought",
            ),
        ),
        Detector(
            "reward_errors",
            0.02,
            reward_errors,
            (),
            (
                "the reward function raises or times out on some completions: see errors.jsonl",
                "the service it calls is down or overloaded",
                "the policy has found texts that break the verifier",
            ),
        ),
    )
}
