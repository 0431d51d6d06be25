"""The PPO recipe, whole: what it measures, options it honours, what it survives, and that it resumes bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastrl.losses.kl import k1
from fastrl.recipes import ppo
from fastrl.train.config import KernelsBlock, PackingBlock, RewardsBlock
from fastrl.train.guards import NonFiniteError, NoVerdictError
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.ppo_round import Measures, measured_round, mini_batches
from fastrl.types import LossOutput, TokenBatch
from tests import oracle_ppo as oracle
from tests.recipes.ppo_runs import make_reward_model, ppo_config, run_ppo
from tests.recipes.runs import Base, after_call, assert_same_run, column, send_sigterm, weights_of
from tests.recipes.test_resuming import resumed
from tests.train.rounds import make_rollouts

JUDGE = "tests.recipes.judges"


# A round


def test_advantages_and_returns_skip_tool_output_and_are_those_of_a_loop_over_each_completion(
    base: Base, tmp_path: Path
) -> None:
    config = ppo_config(base, tmp_path, gamma=0.9, lam=0.7, packing=PackingBlock(token_budget=15))
    rollouts = make_rollouts()
    score = torch.linspace(-1, 1, len(rollouts))

    def measures(factor: float) -> Any:
        return lambda batch: torch.sin(factor * (batch.position_ids + 3 * batch.target + batch.input_ids))

    found = measured_round(
        config,
        rollouts,
        score,
        Measures(measures(0.7), measures(0.9), measures(1.3)),
        estimator=k1,
        kl_coef=0.3,
        device=torch.device("cpu"),
    )
    advantage, total_kl = [], 0.0
    for rollout, sequence, end in zip(rollouts, found.sequences, score.tolist(), strict=True):
        ids = [*rollout.prompt_ids, *rollout.completion_ids]
        sampled = rollout.is_sampled or (True,) * len(rollout.completion_ids)
        places = [len(rollout.prompt_ids) + i for i, is_own in enumerate(sampled) if is_own]
        seen = [i - 1 + 3 * ids[i] + ids[i - 1] for i in places]  # position fed, target, token fed
        kl = [math.sin(0.7 * x) - math.sin(0.9 * x) for x in seen]
        reward = [-0.3 * d for d in kl]
        reward[-1] += end
        expected, returns = oracle.gae(reward, [math.sin(1.3 * x) for x in seen], 0.9, 0.7)
        assert [float(sequence.returns[i]) for i in places] == pytest.approx(returns, abs=1e-5)  # type: ignore[index]
        assert torch.as_tensor(sequence.weight).nonzero()[:, 0].tolist() == places
        advantage += list(zip([float(sequence.advantage[i]) for i in places], expected, strict=True))  # type: ignore[index]
        total_kl += sum(kl)
    ours, theirs = (torch.tensor(column, dtype=torch.float64) for column in zip(*advantage, strict=True))
    torch.testing.assert_close(ours, (theirs - theirs.mean()) / theirs.std(), rtol=1e-5, atol=1e-5)
    assert found.metrics["objective/kl"] == pytest.approx(total_kl / len(rollouts), abs=1e-5)
    assert found.kl == pytest.approx(total_kl / len(theirs), abs=1e-5)


def test_the_mini_batches_of_a_pass_are_all_sequences_once_and_weigh_their_tokens_alike(
    base: Base, tmp_path: Path
) -> None:
    config = ppo_config(base, tmp_path, num_mini_batches=3)
    sequences = measured_round(
        config,
        make_rollouts(),
        torch.zeros(11),
        Measures(*[lambda batch: batch.target.float()] * 3),
        estimator=k1,
        kl_coef=0.0,
        device=torch.device("cpu"),
    ).sequences
    orders = []
    for epoch in range(2):
        parts = mini_batches(config, sequences, ordinal=5, epoch=epoch)
        assert [len(part) for part in parts] == [4, 4, 3]
        for part in parts:
            weights = torch.cat([torch.as_tensor(each.weight) for each in part])
            assert weights.sum().item() == pytest.approx(1)
            assert len(weights[weights > 0].unique()) == 1
        orders.append([tuple(each.ids.tolist()) for part in parts for each in part])  # type: ignore[union-attr]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(tuple(each.ids.tolist()) for each in sequences)  # type: ignore[union-attr]
    assert orders[0] != orders[1]
    assert mini_batches(config, sequences[:2], ordinal=0, epoch=0)[2] == []


# The log


def test_a_round_is_logged_under_trls_names_and_its_parts_add_up(base: Base, tmp_path: Path) -> None:
    lines = run_ppo(base, tmp_path / "run", kl_coef=0.3)
    first = lines[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)  # the policy is its reference
    assert column(lines, "val/ratio")[0] == pytest.approx(1)
    assert column(lines, "policy/approxkl_avg")[0] == pytest.approx(0, abs=1e-9)
    assert first["val/mean"] == first["val/clipfrac_avg"] == 0  # a fresh critic has no opinion
    for line in lines:
        assert line["objective/non_score_reward"] == pytest.approx(-0.3 * line["objective/kl"])
        total = line["objective/scores"] + line["objective/non_score_reward"]
        assert line["objective/rlhf_reward"] == pytest.approx(total)
        assert line["loss"] == pytest.approx(line["loss/policy_avg"] + 0.1 * line["loss/value_avg"])
        assert line["objective/scores"] == pytest.approx(line["reward"])
    # The second round's KL was measured against the frozen start, by a policy that has moved four times.
    assert lines[4]["objective/kl"] > 0
    assert column(lines, "episode") == [8.0] * 4 + [16.0] * 4
    assert column(lines, "learning_rate") == column(lines, "critic/learning_rate")


def test_packing_and_the_cut_into_micro_batches_change_no_curve(base: Base, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kl_coef": 0.1, "pretrain_dataset": str(base.files.sft), "ptx_coef": 0.5}
    whole = run_ppo(base, tmp_path / "whole", **options)
    small = run_ppo(
        base,
        tmp_path / "small",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        packing=PackingBlock(token_budget=16),
        pretrain_max_length=16,
        kernels=KernelsBlock(backend="torch", chunk_rows=3),
        gradient_checkpointing=True,
        **options,
    )
    for name in ("loss", "loss/value_avg", "loss/ptx_avg", "reward", "objective/kl", "grad_norm", "critic/grad_norm"):
        assert column(small, name) == pytest.approx(column(whole, name), rel=2e-3, abs=1e-5), name


# Options


def test_target_kl_stops_the_remaining_updates_of_a_round(base: Base, tmp_path: Path) -> None:
    lines = run_ppo(base, tmp_path / "run", max_steps=6, target_kl=1e-9)
    # The first update of a round measures 0; the second exceeds the target and is the last.
    assert column(lines, "episode") == [8.0, 8.0, 16.0, 16.0, 24.0, 24.0]


def test_the_kl_coefficient_steers_towards_its_target_once_a_round(base: Base, tmp_path: Path) -> None:
    changes = {"kl_coef": 0.5, "adaptive_kl_target": 10.0, "adaptive_kl_horizon": 80}
    lines = run_ppo(base, tmp_path / "run", max_steps=12, **changes)
    # KL is far below 10 nats: error -0.2 for 8 samples of a horizon of 80.
    assert column(lines, "kl_coef") == pytest.approx([0.5] * 4 + [0.5 * 0.98] * 4 + [0.5 * 0.98**2] * 4)


def test_scores_are_standardised_clipped_and_pay_for_truncation(base: Base, tmp_path: Path) -> None:
    plain = run_ppo(base, tmp_path / "plain", max_steps=1)[0]
    cut = plain["completions/clipped_ratio"]
    assert 0 < cut < 1
    paid = run_ppo(base, tmp_path / "paid", max_steps=1, missing_eos_penalty=2.0)[0]
    assert paid["objective/scores"] == pytest.approx(plain["reward"] - 2 * cut)
    assert paid["reward"] == plain["reward"]
    normal = run_ppo(base, tmp_path / "normal", max_steps=1, normalize_rewards=True)[0]
    assert normal["objective/scores"] == pytest.approx(0, abs=1e-6)
    held = run_ppo(base, tmp_path / "held", max_steps=1, reward_clip=0.25)[0]
    assert held["objective/scores"] < min(0.25, plain["reward"])


def test_pretraining_text_keeps_its_likelihood_up(base: Base, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pretrain_dataset": str(base.files.sft), "pretrain_batch_size": 16}
    weak = run_ppo(base, tmp_path / "weak", ptx_coef=1e-6, **options)
    strong = run_ppo(base, tmp_path / "strong", ptx_coef=2.0, **options)
    assert strong[0]["loss/ptx_avg"] == weak[0]["loss/ptx_avg"]
    assert strong[-1]["loss/ptx_avg"] < 0.9 * weak[-1]["loss/ptx_avg"]
    others = 0.1 * strong[0]["loss/value_avg"] + 2 * strong[0]["loss/ptx_avg"]
    assert strong[0]["loss/policy_avg"] == pytest.approx(strong[0]["loss"] - others)


def test_a_reward_model_adds_to_reward_functions_with_its_weight(base: Base, tmp_path: Path) -> None:
    path = str(make_reward_model(base, tmp_path / "reward"))
    lines = run_ppo(base, tmp_path / "run", max_steps=1, reward_model_path=path, reward_model_weight=-0.5)
    parts = lines[0]["rewards/digit_sum/mean"] - 0.5 * lines[0]["rewards/reward_model/mean"]
    assert lines[0]["reward"] == pytest.approx(parts, abs=1e-6)
    assert lines[0]["val/mean"] != 0  # the critic starts from the reward model's weights and head


def test_a_dry_run_shows_models_and_completions_and_writes_nothing(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert ppo.dry_run(ppo_config(base, tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    for text in (
        "policy",
        "reference",
        "critic",
        "GiB added",
        "PolicyGradient",
        "digit_sum",
        "20 prompts; two of them",
    ):
        assert text in printed
    assert list(tmp_path.iterdir()) == []
    assert ppo.dry_run(ppo_config(base, tmp_path / "run", reward_funcs=(f"{JUDGE}:broken",))) == 1


# Faults


def with_nan_in_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The losses of one update are NaN, gradients included; policy and critic take turns."""
    original, calls = ppo.update, []

    def poisoned(optimizer: Any, loss: Any, batches: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        is_meant = len(calls) == number

        def broken(batch: TokenBatch) -> LossOutput:
            output = loss(batch)
            return LossOutput(output.loss * math.nan, output.metrics, output.item_metrics)

        return original(optimizer, broken if is_meant else loss, batches, *args, **options)

    monkeypatch.setattr(ppo, "update", poisoned)


@pytest.mark.parametrize(("number", "role"), [(3, "policy"), (4, "critic")])
def test_numbers_that_are_not_finite_reach_neither_policy_nor_critic(
    base: Base, tmp_path: Path, number: int, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        with_nan_in_update(patch, number)
        lines = run_ppo(base, tmp_path / "run", on_nonfinite="skip", max_steps=4)
    skipped = {"policy": column(lines, "skipped_step"), "critic": column(lines, "critic/skipped_step")}
    assert skipped.pop(role) == [0.0, 1.0, 0.0, 0.0]
    assert list(skipped.values()) == [[0.0] * 4]
    state = load_file(tmp_path / "run" / "checkpoint-4" / "critic.safetensors")
    assert all(tensor.isfinite().all() for tensor in [*state.values(), *weights_of(tmp_path / "run").values()])
    with monkeypatch.context() as patch:
        with_nan_in_update(patch, number)
        with pytest.raises(NonFiniteError, match="step 2: the loss is nan"):
            ppo.run(ppo_config(base, tmp_path / "halted", max_steps=4))


def test_completions_without_a_verdict_train_nothing(base: Base, tmp_path: Path) -> None:
    reward = (f"{JUDGE}:no_verdict_on_the_first_of_four",)
    lines = run_ppo(base, tmp_path / "run", reward_funcs=reward, rewards=RewardsBlock(max_error_rate=1.0))
    assert set(column(lines, "sampling/error_rate")) == {3 / 8}
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_run_that_nobody_judges_stops_after_three_rounds_and_leaves_the_weights(base: Base, tmp_path: Path) -> None:
    config = ppo_config(base, tmp_path / "run", max_steps=20, save_steps=4, reward_funcs=(f"{JUDGE}:broken",))
    with pytest.raises(NoVerdictError, match="no such answer"):
        ppo.run(config)
    state = load_file(tmp_path / "run" / "checkpoint-8" / "optimizer.safetensors")
    for name, weight in load_file(base.model / "model.safetensors").items():
        assert torch.equal(state[f"master.{name}"], weight)


def test_a_sampler_that_disagrees_with_the_trainer_is_seen_in_the_first_update(base: Base, tmp_path: Path) -> None:
    lines = run_ppo(base, tmp_path / "run", temperature=0.7)
    assert max(column(lines, "sampling/probability_error")) < 1.0001


# Resuming

RESUMED: dict[str, dict[str, Any]] = {
    "critic": {"num_generations": 2, "value_learning_rate": 3e-3},
    "running_state": {
        "adaptive_kl_target": 0.01,
        "adaptive_kl_horizon": 50,
        "normalize_rewards": True,
        "ptx_coef": 0.5,
        "pretrain_batch_size": 3,
        "target_kl": 0.01,
    },
    "shared_backbone": {"share_backbone": True},
    "lora": {"use_peft": True, "lora_r": 2, "lora_alpha": 8},
}


@pytest.mark.parametrize("variant", RESUMED)
def test_a_stopped_run_resumes_bit_for_bit(
    base: Base, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"max_steps": 10, "eval_dataset": str(base.files.held_out), "eval_steps": 4}
    changes |= RESUMED[variant]
    if "ptx_coef" in changes:
        changes["pretrain_dataset"] = str(base.files.sft)
    assert ppo.run(ppo_config(base, tmp_path / "whole", **changes)) == 0
    config = ppo_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, ppo, "collect_round", number=2, do=send_sigterm)
        assert ppo.run(config) == EXIT_INTERRUPTED
    assert not (tmp_path / "stopped" / "model").exists()
    assert ppo.run(resumed(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=10)
    for name in ("reward_moments", *(() if variant == "shared_backbone" else ("critic",))):
        one, other = (
            load_file(tmp_path / run / "checkpoint-10" / f"{name}.safetensors") for run in ("whole", "stopped")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    moments = load_file(tmp_path / "whole" / "checkpoint-10" / "reward_moments.safetensors")["moments"]
    assert (moments[0] > 0) == (variant == "running_state")
