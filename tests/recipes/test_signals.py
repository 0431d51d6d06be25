"""What a signal does to a run: each action, on tiny GRPO runs, and the same again after a kill."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from fastrl.recipes import grpo, online_dpo, ppo
from fastrl.report import read_log
from fastrl.report.signals import DETECTORS
from fastrl.train.attend import SignalError, audit, limits_of, unseen
from fastrl.train.config import OnlineDPOConfig, PPOConfig, ReportBlock, SignalsBlock
from tests.recipes.runs import (
    Base,
    PowerCutError,
    after_call,
    assert_same_run,
    column,
    cut_power,
    grpo_config,
    metrics_of,
    run_grpo,
)

# No detector is on.
QUIET = SignalsBlock(**dict.fromkeys(DETECTORS))  # type: ignore[arg-type]


def block(action: str, **changes: float) -> SignalsBlock:
    """Only sparse_reward is on, at 0: without signal it fires after two steps, then every two steps."""
    settings = {
        **vars(QUIET),
        "length_hacking": None,
        "sparse_reward": 0.0,
        "window": 2,
        "actions": {"sparse_reward": action},
    }
    return SignalsBlock(**{**settings, **changes})  # type: ignore[arg-type]


NOTHING = {"reward_funcs": ("tests.recipes.judges:nothing",)}


def fired(folder: Path) -> list[tuple[int, str, str]]:
    return [(line["step"], line["name"], line["action"]) for line in read_log(folder / "signals.jsonl")]


def test_the_defaults_of_the_configuration_are_those_of_the_detectors() -> None:
    assert limits_of(SignalsBlock()).thresholds == {name: each.threshold for name, each in DETECTORS.items()}
    assert limits_of(QUIET).thresholds == {}
    assert asdict(SignalsBlock())["actions"] == {}


def test_a_healthy_run_fires_nothing(base: Base, tmp_path: Path) -> None:
    run_grpo(base, tmp_path / "run", max_steps=24, learning_rate=1e-3, beta=0.05)
    assert fired(tmp_path / "run") == []
    assert audit(tmp_path / "run", SignalsBlock()) == []
    assert {text.partition(" ")[0] for text in unseen(tmp_path / "run", SignalsBlock())} == {
        "reward_hacking",
        "format_hacking",
    }


def test_a_warning_changes_nothing_and_is_heard_once_a_window(
    base: Base,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_grpo(base, tmp_path / "run", max_steps=5, signals=block("warn"), **NOTHING)
    assert fired(tmp_path / "run") == [(2, "sparse_reward", "warn"), (4, "sparse_reward", "warn")]
    assert capsys.readouterr().err.count("sparse_reward: 100% of groups have equal rewards") == 2
    assert [(each.name, each.step) for each in audit(tmp_path / "run", block("warn"))] == [
        ("sparse_reward", 2),
        ("sparse_reward", 4),
    ]


def test_lower_lr_holds_from_then_on_and_after_a_kill(
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {
        "max_steps": 6,
        "lr_scheduler_type": "constant",
        "signals": block("lower_lr"),
        "save_steps": 3,
        **NOTHING,
    }
    lines = run_grpo(base, tmp_path / "whole", **options)
    assert column(lines, "learning_rate") == [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3]
    with monkeypatch.context() as patched:
        after_call(patched, grpo, "learn", number=5, do=cut_power)
        with pytest.raises(PowerCutError):
            run_grpo(base, tmp_path / "cut", **options)
    run_grpo(base, tmp_path / "cut", resume_from_checkpoint="auto", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", checkpoint=6)
    assert fired(tmp_path / "whole") == fired(tmp_path / "cut")


def test_raise_kl_multiplies_the_coefficient(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", max_steps=5, beta=0.1, signals=block("raise_kl"), **NOTHING)
    assert column(lines, "kl_coef") == pytest.approx([0.2, 0.2, 0.4])  # steps 3 to 5; before, the configured one


def test_stop_saves_first_and_the_run_may_go_on_with_other_limits(base: Base, tmp_path: Path) -> None:
    config = grpo_config(base, tmp_path / "run", signals=block("stop"), max_steps=4, **NOTHING)
    with pytest.raises(SignalError, match=r"step 2: sparse_reward: 100% .* \(threshold 0\)\. Mend"):
        grpo.run(config)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    run_grpo(base, tmp_path / "run", signals=QUIET, resume_from_checkpoint="auto", max_steps=4, **NOTHING)
    assert column(metrics_of(tmp_path / "run"), "step") == [1, 2, 3, 4]


def rollback(**changes: float) -> SignalsBlock:
    """As `block`, with a window of four steps."""
    return block("rollback", **{"window": 4, **changes})


def test_rollback_goes_on_from_before_the_onset_with_other_samples(
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Steps 3 to 6 are the first window without signal: the onset is 3, and checkpoint 2 the newest before it.
    options = {
        "max_steps": 8,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "reward_funcs": ("tests.recipes.judges:falls_silent",),
        "signals": rollback(sparse_reward=0.99),
    }
    lines = run_grpo(base, tmp_path / "run", **options)
    folder = tmp_path / "run"
    assert fired(folder)[0] == (6, "sparse_reward", "rollback")
    assert column(lines, "step") == list(range(1, 9))
    taken_back = read_log(folder / "metrics.rolled-back-1.jsonl")
    assert column(taken_back, "step") == list(range(1, 7))
    assert lines[:2] == taken_back[:2]
    assert column(lines, "completions/mean_length")[2:6] != column(taken_back, "completions/mean_length")[2:6]
    names = {path.name for path in folder.glob("checkpoint-*")}
    assert {"checkpoint-2", "checkpoint-4", "checkpoint-4.rolled-back", "checkpoint-6", "checkpoint-8"} <= names
    with monkeypatch.context() as patched:
        after_call(patched, grpo, "learn", number=7, do=cut_power)  # right after the rollback, before a new checkpoint
        with pytest.raises(PowerCutError):
            run_grpo(base, tmp_path / "cut", **options)
    run_grpo(base, tmp_path / "cut", resume_from_checkpoint="auto", **options)
    assert_same_run(folder, tmp_path / "cut", checkpoint=8)


def test_rollback_stops_when_there_is_nothing_to_go_back_to_or_it_has_done_so_too_often(
    base: Base,
    tmp_path: Path,
) -> None:
    with pytest.raises(SignalError, match="No checkpoint before step 1 to go back to"):
        run_grpo(base, tmp_path / "none", max_steps=8, save_steps=2, signals=rollback(), **NOTHING)
    silent = {"reward_funcs": ("tests.recipes.judges:falls_silent",), "learning_rate": 1e-3}
    signals = rollback(sparse_reward=0.99, max_rollbacks=0)
    with pytest.raises(SignalError, match="It would be rollback 1; max_rollbacks stops here"):
        run_grpo(base, tmp_path / "often", max_steps=8, save_steps=2, signals=signals, **silent)


def test_ppo_and_online_dpo_act_too(base: Base, tmp_path: Path) -> None:
    shared = {
        "model_name_or_path": str(base.model),
        "train_dataset": str(base.files.prompts),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "reward_funcs": ("tests.recipes.judges:digit_sum",),
        "report": ReportBlock(panel=False),
    }
    low = {**vars(QUIET), "window": 2, "length_hacking": None, "entropy_collapse": None}
    for action in ("lower_lr", "raise_kl"):
        signals = SignalsBlock(**{**low, "clip_tail": 0.0, "actions": {"clip_tail": action}})
        config = PPOConfig(output_dir=str(tmp_path / f"ppo-{action}"), num_ppo_epochs=2, signals=signals, **shared)  # type: ignore[arg-type]
        assert ppo.run(config) == 0
        lines = metrics_of(tmp_path / f"ppo-{action}")
        if action == "lower_lr":
            assert column(lines, "learning_rate") == [1e-2, 1e-2, 5e-3, 5e-3]
        else:
            assert column(lines, "kl_coef") == pytest.approx([0.05, 0.05, 0.1, 0.1])
    signals = SignalsBlock(**{**low, "sparse_reward": -0.0, "actions": {"sparse_reward": "lower_lr"}})
    nothing = shared | {"reward_funcs": ("tests.recipes.judges:nothing",)}
    assert online_dpo.run(OnlineDPOConfig(output_dir=str(tmp_path / "dpo"), signals=signals, **nothing)) == 0  # type: ignore[arg-type]
    assert column(metrics_of(tmp_path / "dpo"), "learning_rate") == [1e-2, 1e-2, 5e-3, 5e-3]
