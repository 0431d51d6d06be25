"""GRPO that samples ahead: the schedule, resuming, faults. The engine is a real process in each of these runs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from fastrl.recipes import grpo
from fastrl.rollout.process import ProcessEngine
from fastrl.train import ahead
from fastrl.train.config import DynamicSamplingBlock, RewardsBlock, RolloutBlock
from fastrl.train.guards import NoVerdictError
from fastrl.train.interrupt import EXIT_INTERRUPTED
from tests.recipes.runs import (
    Base,
    PowerCutError,
    after_call,
    assert_same_run,
    column,
    cut_power,
    grpo_config,
    is_of_the_clock,
    metrics_of,
    run_grpo,
    send_sigterm,
)

JUDGE = "tests.recipes.judges"
AHEAD: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "rewards": RewardsBlock(workers=0)}


def staleness(k: int) -> RolloutBlock:
    return RolloutBlock(max_staleness=k)


def versions_loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    versions: list[int] = []
    load = ProcessEngine.load_weights

    def recorded(self: Any, model: Any, version: int) -> None:
        versions.append(version)
        load(self, model, version)

    monkeypatch.setattr(ProcessEngine, "load_weights", recorded)
    return versions


@pytest.mark.parametrize(
    ("k", "loaded", "ages"),
    [
        (1, [0, 0, 1, 2, 3, 4], [0, 1, 1, 1, 1, 1]),
        pytest.param(2, [0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 2], marks=pytest.mark.slow),
    ],
)
def test_round_r_is_sampled_by_the_weights_after_round_r_minus_k_minus_1(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, loaded: list[int], ages: list[int]
) -> None:
    versions = versions_loaded(monkeypatch)
    lines = run_grpo(base, tmp_path / "run", rollout=staleness(k), **AHEAD)
    assert versions == loaded
    assert column(lines, "sampling/staleness/max") == column(lines, "sampling/staleness/mean") == ages
    ratios = {name: column(lines, f"sampling/importance_ratio{name}") for name in ("", "/min", "/max")}
    assert ratios["/min"][0] == pytest.approx(1, abs=1e-3)
    assert ratios["/max"][0] == pytest.approx(1, abs=1e-3)
    for low, mean, high in zip(ratios["/min"], ratios[""], ratios["/max"], strict=True):
        assert low <= mean <= high
    assert ratios["/max"][-1] > 1.001  # the weights did move
    assert all(0 < share <= 1 for share in column(lines, "sampling/importance_ratio/effective_share"))
    assert column(lines, "async/dropped_completions") == [0.0] * 6


def test_sampling_ahead_is_deterministic_and_resumes_exactly_after_a_power_cut_and_a_signal(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = AHEAD | {
        "rollout": staleness(2),
        "reward_funcs": (f"{JUDGE}:is_even",),
        "num_generations": 2,
        "dynamic_sampling": DynamicSamplingBlock(max_rounds=2),
        "eval_dataset": str(base.files.held_out),
        "eval_steps": 3,
    }
    assert grpo.run(grpo_config(base, tmp_path / "whole", **changes)) == 0
    config = grpo_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as killing:
        after_call(killing, grpo, "learn", number=3, do=cut_power)
        with pytest.raises(PowerCutError):
            grpo.run(config)
    resumed = replace(config, resume_from_checkpoint="auto")
    with monkeypatch.context() as stopping:
        after_call(stopping, grpo, "learn", number=2, do=send_sigterm)
        assert grpo.run(resumed) == EXIT_INTERRUPTED
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir()
    assert grpo.run(resumed) == 0
    for name in ("whole", "stopped"):
        without_clock(tmp_path / name)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)


def without_clock(folder: Path) -> None:
    """Take out of a log what depends on the clock, and what tells of groups that a checkpoint does not keep."""
    import json

    lines = metrics_of(folder)
    told = ("async/", "rewards/")
    kept = [
        {name: value for name, value in line.items() if not name.startswith(told) and not is_of_the_clock(name)}
        for line in lines
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_a_killed_engine_costs_a_round_of_completions_and_not_the_run(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, engines = ProcessEngine.generate, []

    def killed_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        engines.append(self)
        if len(engines) == 3:
            os.kill(self._child.process.pid, signal.SIGKILL)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ProcessEngine, "generate", killed_once)
    lines = run_grpo(base, tmp_path / "run", rollout=staleness(1), **AHEAD)
    assert column(lines, "sampling/error_rate") == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert column(lines, "skipped_step") == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert column(lines, "epoch") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2])  # no prompt is drawn twice


def test_what_fails_in_the_sampling_thread_ends_the_run_by_its_own_name(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoVerdictError, match="no such answer"):
        run_grpo(base, tmp_path / "broken", rollout=staleness(1), **AHEAD | {"reward_funcs": (f"{JUDGE}:broken",)})
    after_call(monkeypatch, ahead, "collect_round", number=2, do=cut_power)
    with pytest.raises(PowerCutError):
        run_grpo(base, tmp_path / "raised", rollout=staleness(1), **AHEAD)


def test_in_segments_tokens_are_of_several_versions_and_their_logprobs_are_those_of_the_weights_that_chose_them(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    learning = Lock()
    original = grpo.learn

    def noted(*args: Any) -> Any:
        seen.append((args[4].step, args[3]))
        with learning:
            return original(*args)

    sampled = ProcessEngine.generate

    def while_nothing_is_learned(*args: Any, **options: Any) -> Any:
        with learning:  # a busy machine would else sample all that is allowed before the next weights are there
            pass
        return sampled(*args, **options)

    monkeypatch.setattr(grpo, "learn", noted)
    monkeypatch.setattr(ProcessEngine, "generate", while_nothing_is_learned)
    block = RolloutBlock(max_staleness=2, segment_tokens=2)
    lines = run_grpo(base, tmp_path / "run", rollout=block, max_steps=12, rewards=RewardsBlock(workers=0))
    ordinals = [ordinal for _, experience in seen for ordinal in dict.fromkeys(experience.group.tolist())]
    assert len(ordinals) == len(set(ordinals)) == 24  # two groups a step, none lost, none trained twice
    assert set(ordinals) <= set(range(27))  # at most three more begun
    assert max(column(lines, "sampling/staleness/max")) <= 2
    mixed = [r for _, experience in seen for r in experience.rollouts if r.token_version is not None]
    assert mixed
    for step, experience in seen:
        for rollout in experience.rollouts:
            versions = rollout.token_version or (rollout.policy_version,) * len(rollout.completion_ids)
            assert list(versions) == sorted(versions)
            assert versions[0] == rollout.policy_version >= step - 2
            assert len(versions) == len(rollout.completion_ids) == len(rollout.logprob)


@pytest.mark.slow  # tests/train/test_stream.py has the same without processes
def test_a_run_in_segments_goes_on_after_a_power_cut_and_trains_nothing_twice(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = RolloutBlock(max_staleness=2, segment_tokens=2)
    config = grpo_config(base, tmp_path / "run", **AHEAD | {"rollout": block, "max_steps": 8})
    learned: dict[int, list[int]] = {}
    original = grpo.learn

    def noted(*args: Any) -> Any:
        learned[args[4].step] = list(dict.fromkeys(args[3].group.tolist()))
        return original(*args)

    with monkeypatch.context() as killing:
        killing.setattr(grpo, "learn", noted)
        after_call(killing, grpo, "learn", number=5, do=cut_power)
        with pytest.raises(PowerCutError):
            grpo.run(config)
    with monkeypatch.context() as resuming:
        resuming.setattr(grpo, "learn", noted)  # steps 5 on are learned again, and what they held before is forgotten
        assert grpo.run(replace(config, resume_from_checkpoint="auto")) == 0
    ordinals = [ordinal for step in range(8) for ordinal in learned[step]]
    assert len(set(ordinals)) == len(ordinals) == 16
    assert set(ordinals) <= set(range(19))


@pytest.mark.slow
def test_adapters_are_sampled_ahead(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", rollout=staleness(1), use_peft=True, **AHEAD)
    assert column(lines, "sampling/importance_ratio/max")[0] == pytest.approx(1, abs=1e-3)
    assert column(lines, "sampling/importance_ratio/max")[-1] != pytest.approx(1, abs=1e-4)
