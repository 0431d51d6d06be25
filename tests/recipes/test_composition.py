"""Gates, curricula and GDPO, all the way from the configuration to the advantages of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.losses.advantage import group_normalized, multi_objective
from fastrl.recipes import grpo
from fastrl.report import read_completions
from fastrl.train.collect import reward_columns
from tests.recipes.runs import Base, column, run_grpo

JUDGE = "tests.recipes.judges"
TWO = (f"{JUDGE}:digit_sum", f"{JUDGE}:is_even")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, torch.Tensor]]:
    """(experience, advantage) of every round of the runs that follow."""
    seen: list[tuple[Any, torch.Tensor]] = []
    cut = grpo.cut_into_steps
    learn = grpo.learn
    current: list[Any] = []

    def noted(config: Any, setup: Any, journal: Any, experience: Any, progress: Any) -> Any:
        current.append(experience)
        return learn(config, setup, journal, experience, progress)

    def taken(algorithm: Any, rollouts: Any, advantage: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((current[-1], advantage))
        return cut(algorithm, rollouts, advantage, *rest, **options)

    monkeypatch.setattr(grpo, "learn", noted)
    monkeypatch.setattr(grpo, "cut_into_steps", taken)
    return seen


def test_gdpo_normalises_each_reward_in_its_group_and_weighs_it_by_the_step(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    lines = run_grpo(
        base,
        tmp_path / "run",
        max_steps=2,
        reward_funcs=TWO,
        reward_weights=(1.0, 4.0),
        reward_schedule={"is_even": "0: 1, 2: 0"},
        multi_objective_aggregation="normalize_then_sum",
    )
    assert column(lines, "rewards/is_even/weight") == [4.0, 2.0]
    for (experience, advantage), weight in zip(seen, (4.0, 2.0), strict=True):
        columns = torch.tensor(experience.scores.values).T.float()
        normal = [group_normalized(each, experience.group) for each in columns.unbind(1)]
        summed = normal[0] + weight * normal[1]
        expected = (summed - summed.mean()) / (summed.std() + 1e-4)
        torch.testing.assert_close(advantage, expected)
        assert not torch.allclose(advantage, group_normalized(experience.reward, experience.group))


def test_a_completion_that_a_reward_failed_on_is_out_of_every_column(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    run_grpo(
        base,
        tmp_path / "run",
        max_steps=1,
        reward_funcs=(TWO[0], f"{JUDGE}:sometimes"),
        multi_objective_aggregation="normalize_then_sum",
    )
    ((experience, advantage),) = seen
    failed = [sum(rollout.completion_ids) % 3 == 0 for rollout in experience.rollouts]
    assert 0 < sum(failed) < len(failed)
    columns = reward_columns(experience)
    assert columns.isnan().all(1).tolist() == failed
    assert (advantage[torch.tensor(failed)] == 0).all()
    assert advantage.isfinite().all()
    torch.testing.assert_close(advantage, multi_objective(columns, experience.group, torch.ones(2)))


def test_a_gate_reaches_the_rewards_that_train(base: Base, tmp_path: Path) -> None:
    run_grpo(
        base,
        tmp_path / "run",
        max_steps=2,
        reward_funcs=TWO,
        reward_weights=(1.0, 0.0),
        reward_gates={"digit_sum": "is_even"},
    )
    samples = [sample for _, sample in read_completions(tmp_path / "run" / "completions.jsonl")]
    for sample in samples:
        assert sample.reward == (sample.rewards["digit_sum"] if sample.rewards["is_even"] == 1.0 else 0.0)
    assert {sample.rewards["is_even"] for sample in samples} == {0.0, 1.0}


def test_a_gate_on_an_imported_reward_that_is_not_there_stops_before_training(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_gates: there is no reward 'is_odd'; the run has: digit_sum, is_even"):
        run_grpo(base, tmp_path / "run", reward_funcs=TWO, reward_gates={"digit_sum": "is_odd"})
