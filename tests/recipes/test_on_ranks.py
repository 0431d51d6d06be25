"""Recipes on two real processes give what one process gives: the same curve, samples and weights, to rounding."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.recipes import grpo
from fastrl.report import read_log
from fastrl.train import distributed, fit, update
from fastrl.train.config import (
    CPOConfig,
    DataBlock,
    DistributedBlock,
    DPOConfig,
    DynamicSamplingBlock,
    EnvironmentBlock,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    ORPOConfig,
    PackingBlock,
    PRMConfig,
    ReportBlock,
    RewardConfig,
    RewardsBlock,
    RRHFConfig,
    SignalsBlock,
    TrainConfig,
)
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.ranks import launched_ranks
from tests.recipes.agents import make_agent_base
from tests.recipes.distillation import distill_config, gkd_config, make_teacher, store
from tests.recipes.ppo_runs import ppo_config
from tests.recipes.preference_runs import configured, pair_rows, ranked_rows, unpaired_rows, write_rows
from tests.recipes.runs import Base, assert_same_run, grpo_config, learning_curve, metrics_of, sft_config, weights_of
from tests.recipes.test_reward import rows_of
from tests.train.ranks import RECIPES, Failed, on_ranks, on_two, results, run_recipe

# Adam divides by the root of v: an epsilon above the rounding of gradients keeps both runs on one path.
CALM: dict[str, Any] = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "save_steps": 2}
JUDGE = "tests.recipes.judges"

GRPO: dict[str, dict[str, Any]] = {
    "grpo": {},
    "token_mean": {"algorithm": "dapo", "beta": 0.04, "dynamic_sampling": DynamicSamplingBlock(max_rounds=3),
                   "reward_funcs": (f"{JUDGE}:is_even",), "num_generations": 2},
    "constant_length": {"algorithm": "dr_grpo", "steps_per_generation": 2, "num_iterations": 2},
    "batch_scale": {"scale_rewards": "batch", "gradient_accumulation_steps": 3, "reward_funcs": (
        f"{JUDGE}:digit_sum", f"{JUDGE}:sometimes"), "reward_weights": (1.0, 0.5)},
    "adaptive_kl": {"algorithm": "rloo", "beta": 0.1, "adaptive_kl_target": 0.001},
    "kl_in_reward": {"algorithm": "reinforce_pp", "beta": 0.1, "steps_per_generation": 2},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "sequence_ratio": {"algorithm": "gspo", "num_iterations": 2},
    "one_group": {"per_device_train_batch_size": 4, "num_generations": 4},
    "no_signal": {"reward_funcs": (f"{JUDGE}:nothing",)},
}  # fmt: skip
FAST = ("grpo", "token_mean", "batch_scale", "adaptive_kl", "one_group", "no_signal")


def assert_same_to_rounding(one: Path, two: Path, *, checkpoint: int) -> None:
    """One process and two: curves, samples, weights and optimizer state."""
    expected, got = learning_curve(one), learning_curve(two)
    assert len(expected) == len(got) > 0
    for line, other in zip(expected, got, strict=True):
        # A metric of the sampler's rounding errors is one of rounding errors.
        names = {name for name in line.keys() | other.keys() if not name.startswith("sampling/")} - {"episodes/seconds"}
        assert {name: other[name] for name in names} == pytest.approx(
            {name: line[name] for name in names}, rel=1e-4, abs=2e-6
        )
    if (one / "completions.jsonl").exists():
        texts = [
            [(line["step"], line["prompt"], line["completion"]) for line in read_log(folder / "completions.jsonl")]
            for folder in (one, two)
        ]
        assert texts[0] == texts[1]
    for file in (f"checkpoint-{checkpoint}/optimizer.safetensors", "model/model.safetensors"):
        first, second = load_file(one / file), load_file(two / file)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5, msg=f"{file}: {name}")


def check(name: str, config: TrainConfig, folder: Path, **on_ranks_only: Any) -> None:
    """Run a recipe in this process and on two; `config` is that of one."""
    alone, both = (replace(config, output_dir=str(folder / kind)) for kind in ("alone", "both"))
    assert RECIPES[name].run(alone) == 0
    assert results(on_two(name, both, **on_ranks_only)) == [0, 0]
    assert_same_to_rounding(folder / "alone", folder / "both", checkpoint=config.max_steps)
    start = load_file(Path(config.model_name_or_path) / "model.safetensors")
    has_moved = any(
        not torch.equal(start[key], value) for key, value in weights_of(folder / "both").items() if key in start
    )
    assert has_moved == ("nothing" not in str(getattr(config, "reward_funcs", ""))), "the test must train something"


@pytest.mark.parametrize(
    "case", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in GRPO]
)
@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_grpo_and_its_presets(base: Base, tmp_path: Path, case: str, shard: Any) -> None:
    config = grpo_config(base, tmp_path, **(CALM | {"max_steps": 4} | GRPO[case]))
    config = replace(config, packing=PackingBlock(token_budget=60), rewards=RewardsBlock(workers=0, max_error_rate=1.0))
    check("grpo", config, tmp_path, distributed=DistributedBlock(shard=shard))


@pytest.mark.slow
def test_episodes_with_tools(tmp_path: Path) -> None:
    model, prompts = make_agent_base(tmp_path)
    block = EnvironmentBlock(
        factory="tests.recipes.agent_environments:Raising", tools=("calculator",), max_tool_calling_iterations=3,
        workers=2, turn_advantage_weight=0.5, turn_gamma=0.5,
    )  # fmt: skip
    config = GRPOConfig(
        model_name_or_path=str(model), train_dataset=str(prompts), output_dir=str(tmp_path), environment=block,
        reward_funcs=("tests.recipes.agent_environments:presses",), rewards=RewardsBlock(workers=0, max_error_rate=1.0),
        max_steps=2, per_device_train_batch_size=24, num_generations=4, max_completion_length=160, beta=0.04,
        packing=PackingBlock(token_budget=200), report=ReportBlock(panel=False, log_completions=24), **CALM,
    )  # fmt: skip
    check("grpo", config, tmp_path)
    first = metrics_of(tmp_path / "both")[0]
    assert first["tools/call_frequency"] > 0
    assert first["episodes/environment_error_rate"] > 0


def test_three_ranks_and_one_held_out_prompt(base: Base, tmp_path: Path) -> None:
    held_out = tmp_path / "one.jsonl"
    held_out.write_text(base.files.prompts.read_text().partition("\n")[0])
    options = {"per_device_train_batch_size": 12, "num_generations": 6, "eval_dataset": str(held_out), "eval_steps": 2}
    config = grpo_config(base, tmp_path / "alone", **(CALM | options))
    assert RECIPES["grpo"].run(config) == 0
    of_three = replace(config, output_dir=str(tmp_path / "three"), per_device_train_batch_size=4)
    sharded = replace(of_three, distributed=DistributedBlock(shard="optimizer"))
    assert results(on_ranks(3, run_recipe, "grpo", sharded)) == [0, 0, 0]
    assert_same_to_rounding(tmp_path / "alone", tmp_path / "three", checkpoint=4)


def test_all_ranks_go_back_together(base: Base, tmp_path: Path) -> None:
    signals = SignalsBlock(actions={"sparse_reward": "rollback"}, sparse_reward=0.99, window=4)
    config = grpo_config(
        base, tmp_path, **(CALM | {"max_steps": 8, "reward_funcs": (f"{JUDGE}:falls_silent",), "signals": signals})
    )
    check("grpo", config, tmp_path, distributed=DistributedBlock(shard="optimizer"))
    for folder in ("alone", "both"):
        assert len(read_log(tmp_path / folder / "metrics.rolled-back-1.jsonl")) == 6
    fired = [read_log(tmp_path / folder / "signals.jsonl") for folder in ("alone", "both")]
    assert [[(line["step"], line["action"]) for line in lines] for lines in fired] == [[(6, "rollback")]] * 2


def supervised(base: Base, folder: Path) -> TrainConfig:
    return sft_config(base, folder, eval_dataset=str(base.files.sft), eval_steps=2, **CALM)


def preferred(config_type: Any, rows: Callable[[], Any]) -> Callable[[Base, Path], TrainConfig]:
    def make(base: Base, folder: Path) -> TrainConfig:
        data = write_rows(folder / "rows.jsonl", rows())
        return configured(config_type, base, data, folder, eval_dataset=str(data), eval_steps=3, **CALM)

    return make


def judged_pairs(base: Base, folder: Path) -> TrainConfig:
    options: dict[str, Any] = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 6}
    options |= {
        "reward_funcs": (f"{JUDGE}:digit_sum",),
        "data": DataBlock(max_rows=10),
        "rewards": RewardsBlock(workers=0),
    } | CALM
    return configured(OnlineDPOConfig, base, base.files.prompts, folder, **options)


def stepwise(base: Base, folder: Path) -> TrainConfig:
    data = write_rows(folder / "rows.jsonl", rows_of("steps", 24))
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 6, "report": ReportBlock(panel=False)}
    return PRMConfig(
        model_name_or_path=str(base.model), output_dir=str(folder), train_dataset=str(data), step_separator="<|end|>",
        **(options | CALM),
    )  # fmt: skip


def preferring(base: Base, folder: Path) -> TrainConfig:
    data = write_rows(folder / "rows.jsonl", pair_rows(24))
    return configured(RewardConfig, base, data, folder, eval_dataset=str(data), **CALM)


def with_critic(base: Base, folder: Path) -> TrainConfig:
    return ppo_config(base, folder, kl_coef=0.05, whiten_rewards=True, rewards=RewardsBlock(workers=0), **CALM)


def distilled(base: Base, folder: Path) -> TrainConfig:
    wise = make_teacher(folder / "teacher")
    return distill_config(base, folder, teacher_logprobs=store(base, wise, folder / "top"), **CALM)


def own_completions(base: Base, folder: Path) -> TrainConfig:
    return gkd_config(base, folder, teacher_model_name_or_path=str(make_teacher(folder / "teacher")), lmbda=0.6, **CALM)


OFFLINE: dict[str, Callable[[Base, Path], TrainConfig]] = {
    "sft": supervised,
    "dpo": preferred(DPOConfig, pair_rows),
    "kto": preferred(KTOConfig, unpaired_rows),
    "reward": preferring,
    "cpo": preferred(CPOConfig, pair_rows),
    "orpo": preferred(ORPOConfig, pair_rows),
    "rrhf": preferred(RRHFConfig, ranked_rows),
    "online_dpo": judged_pairs,
    "prm": stepwise,
    "ppo": with_critic,
    "distill": distilled,
    "gkd": own_completions,
}
FIRST = ("sft", "dpo", "kto", "reward", "ppo")


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in OFFLINE]
)
def test_every_recipe_with_an_optimizer(base: Base, tmp_path: Path, name: str) -> None:
    check(name, OFFLINE[name](base, tmp_path), tmp_path)


# Stopping and going on


def test_a_signal_to_any_rank_stops_all_and_the_run_goes_on_bit_for_bit(base: Base, tmp_path: Path) -> None:
    config = grpo_config(base, tmp_path / "whole", rewards=RewardsBlock(workers=0), **CALM)
    shard = DistributedBlock(shard="optimizer")
    assert results(on_two("grpo", config, distributed=shard)) == [0, 0]
    stopped = replace(config, output_dir=str(tmp_path / "stopped"), per_device_train_batch_size=4, distributed=shard)
    assert results(on_ranks(2, stopped_on_rank_1, stopped)) == [EXIT_INTERRUPTED] * 2
    assert learning_curve(tmp_path / "stopped") == learning_curve(tmp_path / "whole")[:2]
    assert results(on_ranks(2, run_recipe, "grpo", replace(stopped, resume_from_checkpoint="auto"))) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=4)


def stopped_on_rank_1(config: TrainConfig) -> int | None:
    """As when an operator sends SIGTERM to one process, in the middle of its second step."""
    original, calls = grpo.learn, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    grpo.learn = counted
    return run_recipe("grpo", config)


@pytest.mark.parametrize("before", [1, 2])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(base: Base, tmp_path: Path, before: int) -> None:
    config = sft_config(base, tmp_path / "run", **CALM)
    kinds = {
        1: config,
        2: replace(config, per_device_train_batch_size=4, distributed=DistributedBlock(shard="optimizer")),
    }
    assert RECIPES["sft"].run(replace(config, output_dir=str(tmp_path / "whole"))) == 0
    assert results(on_ranks(before, stopped_after_two_steps, kinds[before])) == [EXIT_INTERRUPTED] * before
    resumed = replace(kinds[3 - before], resume_from_checkpoint="auto")
    assert results(on_ranks(3 - before, run_recipe, "sft", resumed)) == [0] * (3 - before)
    assert_same_to_rounding(tmp_path / "whole", tmp_path / "run", checkpoint=4)


def stopped_after_two_steps(config: TrainConfig) -> int | None:
    original, calls = fit.update, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2 and distributed.rank() == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **options)

    fit.update = counted
    return run_recipe("sft", config)


def test_another_number_of_ranks_must_keep_the_size_of_a_step(base: Base, tmp_path: Path) -> None:
    config = sft_config(base, tmp_path, **CALM)
    assert RECIPES["sft"].run(config) == 0
    found = on_ranks(2, run_recipe, "sft", replace(config, resume_from_checkpoint="auto"))
    for each in found:
        assert isinstance(each, Failed)
        assert "per_device_train_batch_size x gradient_accumulation_steps x ranks: 8 -> 16" in each.message


# Also what may change when a run is resumed: a rank that saved alone would wait for what no other rank sends.
@pytest.mark.parametrize(
    "other", [{"seed": 43}, {"save_steps": 3}, {"eval_steps": 1}, {"packing": PackingBlock(token_budget=99)}], ids=str
)
def test_ranks_with_different_configurations_are_refused(base: Base, tmp_path: Path, other: dict[str, Any]) -> None:
    for each in on_ranks(2, changed_on_rank_1, sft_config(base, tmp_path), other):
        assert isinstance(each, Failed)
        assert "was started with another configuration" in each.message
        assert next(iter(other)) in each.message
    assert not (tmp_path / "run.json").exists()


def changed_on_rank_1(config: TrainConfig, other: dict[str, Any]) -> int | None:
    return run_recipe("sft", replace(config, **other) if launched_ranks().rank == 1 else config)


def test_a_number_that_is_not_finite_on_one_rank_is_skipped_by_all(base: Base, tmp_path: Path) -> None:
    config = sft_config(base, tmp_path / "run", on_nonfinite="skip", per_device_train_batch_size=4)
    assert results(on_ranks(2, with_nan_on_rank_1, config)) == [0, 0]
    assert [line["skipped_step"] for line in learning_curve(tmp_path / "run")] == [0, 1, 0, 0]
    assert all(bool(weight.isfinite().all()) for weight in weights_of(tmp_path / "run").values())
    halting = replace(config, on_nonfinite="halt", output_dir=str(tmp_path / "halting"))
    assert [each.kind for each in on_ranks(2, with_nan_on_rank_1, halting) if isinstance(each, Failed)] == [
        "NonFiniteError",
        "NonFiniteError",
    ]


def with_nan_on_rank_1(config: TrainConfig) -> int | None:
    """The second step's loss is NaN, and only where rank 1 computes it."""
    original, calls = update.sums_of, []

    def spoiled(pairs: Any) -> Any:
        sums = original(pairs)
        calls.append(sums)
        is_bad = len(calls) == 2 and distributed.rank() == 1
        return replace(sums, loss=sums.loss * float("nan")) if is_bad else sums

    update.sums_of = spoiled
    return run_recipe("sft", config)
