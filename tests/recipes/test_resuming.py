"""A run that was stopped and goes on with `--resume auto` is the run that was never stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.recipes import grpo, sft
from fastrl.train import ahead, fit
from fastrl.train.config import DynamicSamplingBlock, RewardsBlock
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.run_directory import RunDirectoryError
from tests.recipes.runs import (
    Base,
    PowerCutError,
    after_call,
    assert_same_run,
    cut_power,
    grpo_config,
    learning_curve,
    metrics_of,
    send_sigterm,
    sft_config,
)

JUDGE = "tests.recipes.judges"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adaptive_kl": {"beta": 0.5, "adaptive_kl_target": 0.01, "num_iterations": 2},
    "reused_batches": {"num_iterations": 2, "steps_per_generation": 2, "lr_scheduler_type": "cosine"},
    "dynamic_sampling": {
        "reward_funcs": (f"{JUDGE}:is_even",),
        "num_generations": 2,
        "dynamic_sampling": DynamicSamplingBlock(max_rounds=2),
    },
    "kl_in_reward": {"algorithm": "reinforce_pp", "adaptive_kl_target": 0.01},
    "failing_judge": {
        "reward_funcs": (f"{JUDGE}:digit_sum", f"{JUDGE}:no_verdict_on_the_first_of_four"),
        "rewards": RewardsBlock(max_error_rate=1.0),
    },
    "sparse_log": {"logging_steps": 4, "save_steps": 2, "warmup_ratio": 0.5},
}


def resumed(config: Any) -> Any:
    return replace(config, resume_from_checkpoint="auto")


@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo_stopped_by_a_signal_while_sampling_resumes_bit_for_bit(
    base: Base, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"max_steps": 6, "eval_dataset": str(base.files.held_out), "eval_steps": 2}
    changes |= VARIANTS[variant]
    assert grpo.run(grpo_config(base, tmp_path / "whole", **changes)) == 0
    config = grpo_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, ahead, "collect_round", number=2, do=send_sigterm)
        assert grpo.run(config) == EXIT_INTERRUPTED
    taken = metrics_of(tmp_path / "stopped")[-1]["step"] if variant != "sparse_log" else 1
    assert (tmp_path / "stopped" / f"checkpoint-{taken}").is_dir()
    assert grpo.run(resumed(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)


@pytest.mark.parametrize("variant", ["plain", "reused_batches", "adaptive_kl"])
def test_grpo_stopped_by_a_signal_while_learning_takes_the_round_to_its_end(
    base: Base, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 6, "save_steps": 100, **VARIANTS[variant]}
    assert grpo.run(grpo_config(base, tmp_path / "whole", **changes)) == 0
    config = grpo_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, grpo, "update", number=2, do=send_sigterm)
        assert grpo.run(config) == EXIT_INTERRUPTED
    updates = config.num_iterations * config.steps_per_generation
    assert (tmp_path / "stopped" / f"checkpoint-{max(2, updates)}").is_dir()
    assert not (tmp_path / "stopped" / "model").exists()
    assert grpo.run(resumed(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)


def test_grpo_killed_between_checkpoints_logs_no_step_twice(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grpo.run(grpo_config(base, tmp_path / "whole", max_steps=6, save_steps=2)) == 0
    config = grpo_config(base, tmp_path / "killed", max_steps=6, save_steps=2)
    with monkeypatch.context() as killing:
        after_call(killing, grpo, "learn", number=3, do=cut_power)
        with pytest.raises(PowerCutError):
            grpo.run(config)
    assert [line["step"] for line in metrics_of(tmp_path / "killed")] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-2"]
    assert grpo.run(resumed(config)) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    assert_same_run(tmp_path / "whole", tmp_path / "killed", checkpoint=6)


def test_grpo_interrupted_before_its_first_step_is_saved_and_starts_again_alike(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grpo.run(grpo_config(base, tmp_path / "whole")) == 0
    config = grpo_config(base, tmp_path / "stopped")
    with monkeypatch.context() as stopping:
        after_call(stopping, ahead, "collect_round", number=1, do=send_sigterm)
        assert grpo.run(config) == EXIT_INTERRUPTED
    assert (tmp_path / "stopped" / "checkpoint-0").is_dir()
    assert grpo.run(resumed(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=4)


def test_a_finished_grpo_run_resumes_into_nothing_but_its_model(base: Base, tmp_path: Path) -> None:
    config = grpo_config(base, tmp_path / "run")
    assert grpo.run(config) == 0
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert grpo.run(resumed(config)) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_another_seed_is_another_run(base: Base, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert grpo.run(grpo_config(base, tmp_path / str(seed), seed=seed)) == 0
    assert learning_curve(tmp_path / "1") != learning_curve(tmp_path / "2")


SFT_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"max_steps": 6},
    "epochs": {"max_steps": -1, "per_device_train_batch_size": 7},  # 40 rows: the last batch has 5
    "smoothed": {"max_steps": 6, "label_smoothing": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "evaluated": {"max_steps": 6, "eval_steps": 4, "logging_steps": 3},
}


@pytest.mark.parametrize("variant", SFT_VARIANTS)
@pytest.mark.parametrize("stop", [send_sigterm, cut_power])
def test_sft_stopped_after_any_step_resumes_bit_for_bit(
    base: Base, tmp_path: Path, variant: str, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"save_steps": 3, "eval_dataset": str(base.files.sft), **SFT_VARIANTS[variant]}
    assert sft.run(sft_config(base, tmp_path / "whole", **changes)) == 0
    config = sft_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=5, do=stop)
        if stop is cut_power:
            with pytest.raises(PowerCutError):
                sft.run(config)
        else:
            assert sft.run(config) == EXIT_INTERRUPTED
    newest = 3 if stop is cut_power else 5
    saved = sorted(path.name for path in (tmp_path / "stopped").glob("checkpoint-*"))
    assert saved == sorted({"checkpoint-3", f"checkpoint-{newest}"})
    assert not (tmp_path / "stopped" / "model").exists()
    assert sft.run(resumed(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)


@pytest.mark.parametrize("changed", ["data", "weights"])
def test_a_run_is_not_continued_on_other_data_or_weights(base: Base, tmp_path: Path, changed: str) -> None:
    model = Path(shutil.copytree(base.model, tmp_path / "model"))
    data = Path(shutil.copy(base.files.prompts, tmp_path / "prompts.jsonl"))
    config = grpo_config(
        base, tmp_path / "run", model_name_or_path=str(model), train_dataset=str(data), max_steps=2, save_steps=1
    )
    assert grpo.run(config) == 0
    file = data if changed == "data" else model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=rf"contents\..*{file.name}"):
        grpo.run(resumed(config))
