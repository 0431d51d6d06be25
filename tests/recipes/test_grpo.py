"""The GRPO recipe, whole: passes it saves, options it honours, what it logs and what it survives."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.algorithms import policy_gradient
from fastrl.recipes import grpo
from fastrl.report import read_log
from fastrl.rollout.builtin import BuiltinEngine
from fastrl.train import from_config, logprob
from fastrl.train.config import (
    DataBlock,
    KernelsBlock,
    OverlongBlock,
    PackingBlock,
    ReportBlock,
    RolloutBlock,
    SamplerCorrectionBlock,
)
from fastrl.train.guards import SamplerMismatchError
from tests.recipes.runs import Base, column, grpo_config, learning_curve, metrics_of, run_grpo, weights_of

JUDGE = "tests.recipes.judges"
QUIET = ReportBlock(panel=False)


# Passes


@pytest.mark.parametrize(
    ("changes", "policy", "reference"),
    [
        ({}, 2, 0),
        ({"num_iterations": 2}, 1 + 2, 0),
        ({"steps_per_generation": 2}, 2 + 2, 0),
        ({"beta": 0.1}, 2, 2),
        ({"beta": 0.1, "kl_estimator": "k1", "kl_placement": "reward"}, 2 + 2, 2),
        ({"beta": 0.1, "num_iterations": 2}, 1 + 2, 1),
        ({"top_entropy_quantile": 0.5}, 2 + 2, 0),
        ({"parity": "trl"}, 2, 0),
    ],
    ids=str,
)
def test_two_steps_feed_the_backbone_no_more_than_they_must(
    base: Base, tmp_path: Path, changes: dict[str, Any], policy: int, reference: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    load = from_config.load_model

    def counted(*args: Any, **options: Any) -> Any:
        model, number = load(*args, **options), len(passes)
        passes.append(0)

        def count(module: Any, positional: Any, named: dict[str, Any]) -> None:
            passes[number] += "packing" in named  # the engine decodes through the same module

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    monkeypatch.setattr(from_config, "load_model", counted)
    lines = run_grpo(base, tmp_path / "run", max_steps=2, **changes)
    assert column(lines, "skipped_step") == [0.0, 0.0]
    assert passes == ([policy, reference] if reference else [policy])


def test_completions_without_signal_never_reach_the_backbone(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", reward_funcs=(f"{JUDGE}:nothing",), weight_decay=0.1)
    assert column(lines, "trained_sequences") == column(lines, "loss") == column(lines, "grad_norm") == [0.0] * 4
    assert column(lines, "frac_reward_zero_std") == column(lines, "skipped_step") == [1.0] * 4
    assert column(lines, "reward") == [0.5] * 4
    trained = weights_of(tmp_path / "run")
    for name, weight in from_config.load_model(base.model, dtype=torch.float32, device="cpu").state_dict().items():
        assert name not in trained or torch.equal(trained[name], weight)


def test_every_round_and_every_evaluation_samples_from_the_newest_weights(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions: list[int] = []
    load = BuiltinEngine.load_weights

    def recorded(self: Any, model: Any, version: int) -> None:
        versions.append(version)
        load(self, model, version)

    monkeypatch.setattr(BuiltinEngine, "load_weights", recorded)
    run_grpo(base, tmp_path / "run", steps_per_generation=2, eval_dataset=str(base.files.held_out))
    assert versions == [0, 2, 4]


# What is logged


def test_metrics_have_the_names_of_trl(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", beta=0.1, max_steps=2, parity="trl", eval_dataset=str(base.files.held_out))
    of_trl = """reward reward_std rewards/digit_sum/mean rewards/digit_sum/std frac_reward_zero_std
        completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
        completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length
        kl entropy clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean
        sampling/sampling_logp_difference/mean sampling/importance_sampling_ratio/mean
        loss grad_norm learning_rate num_tokens epoch step_time"""
    ours = """rewards/digit_sum/error_rate sampling/error_rate sampling/probability_error ratio approx_kl
        sampling/importance_ratio
        time/rollout time/reward time/logprob time/train time/sync tokens_per_second memory/peak_gib
        skipped_step trained_sequences dynamic_sampling/waste ratio_tail completions/duplicates
        rewards/correlation/digit_sum/length rewards/correlation/reward/length"""
    assert lines[0].keys() == {"step", "time", *of_trl.split(), *ours.split()}
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert column(lines, "eval/reward") != []
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    for name in ours.split():
        assert name.split("/")[-1] in documented, name


def test_epochs_tokens_and_seconds_add_up(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", num_iterations=2, max_steps=6)
    assert column(lines, "epoch") == [0.2, 0.2, 0.4, 0.4, 0.6, 0.6]  # 2 of 10 prompts a round
    tokens = column(lines, "num_tokens")
    assert tokens[0] == tokens[1] < tokens[2] == tokens[3]
    completions = column(lines, "completions/mean_length")
    assert tokens[0] == 8 * (8 + completions[0])  # "<user>839201<assistant>" has 8 tokens
    for line in lines:
        seconds = sum(value for name, value in line.items() if name.startswith("time/"))
        assert line["step_time"] == pytest.approx(seconds)
        assert line["tokens_per_second"] > 0
    assert lines[0]["time/rollout"] == lines[1]["time/rollout"]


def test_the_number_of_logged_completions_is_honoured(base: Base, tmp_path: Path) -> None:
    run_grpo(base, tmp_path / "three", report=replace(QUIET, log_completions=3), logging_steps=2)
    samples = read_log(tmp_path / "three" / "completions.jsonl")
    assert [sample["step"] for sample in samples] == [2, 2, 2, 4, 4, 4]
    assert [line["step"] for line in metrics_of(tmp_path / "three")] == [1, 2, 3, 4]  # the file has all
    run_grpo(base, tmp_path / "none", report=replace(QUIET, log_completions=0))
    assert (tmp_path / "none" / "completions.jsonl").read_text() == ""


def test_the_logged_reward_of_a_completion_is_the_one_that_trained(base: Base, tmp_path: Path) -> None:
    changes = {"overlong": OverlongBlock(buffer=6, penalty=6.0), "report": replace(QUIET, log_completions=8)}
    lines = run_grpo(base, tmp_path / "run", max_steps=1, **changes)
    samples = read_log(tmp_path / "run" / "completions.jsonl")
    rewards = [sample["reward"] for sample in samples]
    assert lines[0]["reward"] == pytest.approx(sum(rewards) / 8)
    assert any(sample["reward"] < sample["rewards"]["digit_sum"] - 0.9 for sample in samples)


def test_the_report_shows_the_configuration_and_the_environment(base: Base, tmp_path: Path) -> None:
    run_grpo(base, tmp_path / "run", max_steps=1)
    page = (tmp_path / "run" / "report.html").read_text()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["torch_threads"] == torch.get_num_threads()
    assert environment["device"]["type"] == "cpu"
    for text in ("<h2>Configuration</h2>", "num_generations", "<h2>Environment</h2>", "torch_threads"):
        assert text in page


def test_a_run_prints_steps_and_no_bars_of_transformers(
    base: Base, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_grpo(base, tmp_path / "run", max_steps=1)
    printed = capfd.readouterr()
    assert "step 1/1" in printed.out
    assert printed.err == ""


# Options


def test_the_trained_distribution_has_the_sampling_temperature(base: Base, tmp_path: Path) -> None:
    for temperature in (0.5, 1.7):
        lines = run_grpo(base, tmp_path / str(temperature), temperature=temperature, max_steps=2)
        assert max(column(lines, "sampling/sampling_logp_difference/mean")) < 1e-5
    low, high = (metrics_of(tmp_path / name)[0]["entropy"] for name in ("0.5", "1.7"))
    assert low < high - 0.1


@pytest.mark.parametrize("log_completions", [0, 4])
def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(
    base: Base, tmp_path: Path, log_completions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = BuiltinEngine.generate

    def lying(self: Any, *args: Any, **options: Any) -> Any:
        found = honest(self, *args, **options)
        return [replace(rollout, logprob=tuple(x - 1 for x in rollout.logprob)) for rollout in found]

    monkeypatch.setattr(BuiltinEngine, "generate", lying)
    config = grpo_config(base, tmp_path / "run", report=replace(QUIET, log_completions=log_completions))
    with pytest.raises(SamplerMismatchError, match=r"step 1: .* factor 2\.718"):
        grpo.run(config)
    assert grpo.run(replace(config, output_dir=str(tmp_path / "filtered"), top_k=5)) == 0  # differs, as it must


def test_evaluations_come_when_asked_and_are_of_the_same_samples(base: Base, tmp_path: Path) -> None:
    changes = {"eval_dataset": str(base.files.held_out), "eval_steps": 2, "learning_rate": 1e-30, "max_steps": 5}
    lines = run_grpo(base, tmp_path / "run", logging_steps=5, **changes)
    evaluated = [line for line in lines if "eval/reward" in line]
    assert [line["step"] for line in evaluated] == [2, 4, 5]
    assert len({line["eval/reward"] for line in evaluated}) == 1
    assert evaluated[0]["eval/reward"] == pytest.approx(evaluated[0]["eval/rewards/digit_sum/mean"])
    assert evaluated[0]["eval/reward_standard_error"] > 0


def test_an_evaluation_that_no_reward_can_judge_is_logged_as_that_and_stops_nothing(base: Base, tmp_path: Path) -> None:
    changes = {"eval_dataset": str(base.files.held_out), "reward_funcs": (f"{JUDGE}:broken",)}
    lines = run_grpo(base, tmp_path / "run", max_steps=2, **changes)
    assert column(lines, "eval/rewards/broken/error_rate") == [1.0]
    assert column(lines, "eval/reward") == []


def test_only_the_newest_checkpoints_are_kept(base: Base, tmp_path: Path) -> None:
    run_grpo(base, tmp_path / "run", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_rate_warms_up_from_nothing_and_falls(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", learning_rate=0.8, warmup_steps=2, lr_scheduler_type="linear")
    assert column(lines, "learning_rate") == pytest.approx([0.0, 0.4, 0.8, 0.4])


def test_target_kl_stops_the_remaining_updates_of_a_batch(base: Base, tmp_path: Path) -> None:
    free = run_grpo(base, tmp_path / "free", num_iterations=3, max_steps=6)
    assert column(free, "epoch") == [0.2, 0.2, 0.2, 0.4, 0.4, 0.4]
    bound = run_grpo(base, tmp_path / "bound", num_iterations=3, max_steps=6, target_kl=1e-9)
    # The first update of a batch measures 0; the second exceeds the target and is the last.
    assert column(bound, "epoch") == [0.2, 0.2, 0.4, 0.4, 0.6, 0.6]
    assert column(bound, "approx_kl")[::2] == [0.0] * 3
    assert min(column(bound, "approx_kl")[1::2]) > 1e-9


def test_the_kl_coefficient_steers_towards_its_target(base: Base, tmp_path: Path) -> None:
    lines = run_grpo(base, tmp_path / "run", beta=0.5, adaptive_kl_target=10.0)
    # KL is far below 10 nats: error -0.2 for 8 samples of a horizon of 10,000.
    assert column(lines, "kl_coef") == pytest.approx([0.5 * (1 - 0.2 * 8 / 10_000) ** k for k in (1, 2, 3, 4)])
    preset = run_grpo(base, tmp_path / "preset", algorithm="reinforce_pp", adaptive_kl_target=10.0, max_steps=1)
    assert column(preset, "kl_coef") == pytest.approx([0.01 * (1 - 0.2 * 8 / 10_000)])


def test_every_update_is_penalised_with_the_newest_kl_coefficient(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    make_loss = grpo.policy_batch_loss

    def recorded(model: Any, algorithm: Any, kernels: Any, *, temperature: float) -> Any:
        used.append(algorithm.kl.coef)
        return make_loss(model, algorithm, kernels, temperature=temperature)

    monkeypatch.setattr(grpo, "policy_batch_loss", recorded)
    lines = run_grpo(base, tmp_path / "run", beta=0.5, adaptive_kl_target=10.0, num_iterations=2)
    assert used == [0.5, *column(lines, "kl_coef")[:3]]


def test_every_op_over_the_head_runs_on_the_backend_and_chunks_of_the_run(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def spied(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spy(*args: Any, **options: Any) -> Any:
            asked.append((module.__name__, name, options["backend"], options["chunk_rows"]))
            return original(*args, **options)

        monkeypatch.setattr(module, name, spy)

    spied(logprob, "linear_logprob")
    spied(policy_gradient, "linear_logprob")
    spied(policy_gradient, "linear_token_loss")
    changes: dict[str, Any] = {"beta": 0.1, "num_iterations": 2, "importance_sampling_level": "sequence"}
    kernels = KernelsBlock(backend="torch", chunk_rows=3)
    run_grpo(base, tmp_path / "run", max_steps=2, kernels=kernels, **changes)
    assert {(module.rpartition(".")[2], name) for module, name, *_ in asked} == {
        ("logprob", "linear_logprob"),
        ("policy_gradient", "linear_logprob"),
        ("policy_gradient", "linear_token_loss"),
    }
    assert {tuple(options) for _, _, *options in asked} == {("torch", 3)}


def test_packing_and_decoding_in_small_batches_change_no_curve(base: Base, tmp_path: Path) -> None:
    whole = run_grpo(base, tmp_path / "whole", beta=0.1, num_iterations=2)
    small = run_grpo(
        base,
        tmp_path / "small",
        beta=0.1,
        num_iterations=2,
        packing=PackingBlock(token_budget=13),
        rollout=RolloutBlock(batch_size=3),
        kernels=KernelsBlock(chunk_rows=2),
        gradient_checkpointing=True,
    )
    for name in ("loss", "reward", "kl", "grad_norm", "entropy", "completions/mean_length"):
        assert column(small, name) == pytest.approx(column(whole, name), rel=2e-3, abs=1e-5), name


def test_gradient_accumulation_is_another_word_for_a_larger_batch(base: Base, tmp_path: Path) -> None:
    run_grpo(base, tmp_path / "one", per_device_train_batch_size=8)
    run_grpo(base, tmp_path / "two", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert learning_curve(tmp_path / "one") == learning_curve(tmp_path / "two")


def test_sampler_correction_and_entropy_bonus_reach_the_loss(base: Base, tmp_path: Path) -> None:
    plain = run_grpo(base, tmp_path / "plain", max_steps=1)
    bonus = run_grpo(base, tmp_path / "bonus", max_steps=1, entropy_coef=0.5)
    assert bonus[0]["loss"] == pytest.approx(plain[0]["loss"] - 0.5 * bonus[0]["entropy"], rel=0.2)
    block = SamplerCorrectionBlock(mode="truncate", high=0.25)
    corrected = run_grpo(base, tmp_path / "corrected", max_steps=1, sampler_correction=block)
    assert corrected[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(0.25)
    assert corrected[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"] / 4, rel=1e-3)


# Dry run


def test_a_dry_run_shows_two_prompts_with_completions_and_rewards_and_writes_nothing(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bad = tmp_path / "train.jsonl"
    bad.write_text(base.files.prompts.read_text() + '{"prompt": 3}\n')
    config = grpo_config(base, tmp_path / "run", train_dataset=str(bad), data=DataBlock(skip_bad_rows=True))
    assert grpo.dry_run(config) == 0
    printed = capsys.readouterr().out
    assert "PolicyGradient" in printed
    assert "9988 prompts; two of them" in printed
    for name in ("digit_sum", "reward", "finish", "tokens"):
        assert name in printed
    questions = [json.loads(line)["prompt"][0]["content"] for line in bad.read_text().splitlines()[:2]]
    for question in questions:
        assert printed.count(f"<|user|>{question}<|assistant|>") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]


def test_a_dry_run_with_a_broken_reward_shows_its_traceback_and_fails(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grpo.dry_run(grpo_config(base, tmp_path / "run", reward_funcs=(f"{JUDGE}:broken",))) == 1
    printed = capsys.readouterr().out
    assert "broken failed on 4 completions" in printed
    assert "KeyError: 'no such answer'" in printed
