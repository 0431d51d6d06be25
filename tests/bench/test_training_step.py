"""The replayed training step: contenders agree, a wrong one is caught, records hold what the table needs."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bench import this_machine, training_step
from bench.training_cases import CPU_CASES, Case, random_model, replayed, workload
from bench.training_step import CPU_CHUNK, measured
from bench.trl_contender import NAMES
from fastrl.ops import head
from fastrl.plan.lengths import Lengths
from fastrl.plan.shape import ModelShape
from fastrl.train.optimizer import MasterAdamW

TINY = ModelShape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate=32, vocab=50, tied=True)
CASE = Case(TINY, 4, 4, Lengths(prompt=3, median=6, longest=20), 0.5, 64)


@pytest.fixture(autouse=True)
def _copies_that_fit_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is not tested here, and a gigabyte takes seconds."""
    monkeypatch.setattr(this_machine, "COPIED", 1 << 20)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own name for it
def test_contenders_take_the_same_step_and_are_all_timed() -> None:
    records = [each for each in measured(CASE, device="cpu", repeats=2) if "not_timed" not in each]
    assert [record["contender"] for record in records] == [
        *("fastrl", "no packing", "eager head", "no skipping", "no sharing", "none of these"),
        *(NAMES if find_spec("trl") is not None else ()),
    ]
    for record in records:
        assert 0 < record["ms_p10"] <= record["ms"] <= record["ms_p90"]
        assert record["tokens_per_second"] > 0
        assert record["peak_gib"] > 0
    assert records[0]["predicted_ms"] > 0
    assert "predicted_ms" not in records[1]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_contender_with_another_loss_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = training_step.contenders

    def tampered(*arguments: object) -> object:
        steps = real(*arguments)  # type: ignore[arg-type]
        return {**steps, "wrong": lambda: {"loss": 9.0, "grad_norm": 1.0}}

    monkeypatch.setattr(training_step, "contenders", tampered)
    records = {record["contender"]: record for record in measured(CASE, device="cpu", repeats=2)}
    assert records["wrong"]["not_timed"].startswith("RuntimeError: wrong has loss 9.0")
    assert "ms" not in records["wrong"]


@pytest.mark.parametrize(("allowed", "error", "leaves"), [(1e-4, 9e-5, False), (1e-4, 2e-4, True), (5e-3, 2e-4, False)])
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_contenders_agree_to_the_precision_of_their_numbers(
    allowed: float, error: float, leaves: bool, key: str
) -> None:
    truth = {"loss": -2.0, "grad_norm": 3.0}
    steps = {"fastrl": lambda: truth, "other": lambda: {**truth, key: truth[key] * (1 + error)}}
    assert (training_step.check(steps, allowed) != {}) == leaves == ("other" not in steps)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_the_layers_in_triton_take_the_same_step_and_leave_the_model_as_it_was(lora_r: int) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    tiny = replace(CASE, prompts=2, generations=2, lora_r=lora_r)
    model = random_model(tiny.shape, tiny.lengths, dtype=torch.float32, device="cpu", lora_r=lora_r)
    kinds = [type(module) for module in model.modules()]
    optimizer = MasterAdamW(model)
    step = training_step.contenders(tiny, model, optimizer, replayed(tiny))["fastrl"]
    steps = {"fastrl": step, training_step.TRITON: lambda: training_step._in_triton(model, step)}
    assert training_step.check(steps, 1e-4) == {}
    found, truth = steps[training_step.TRITON](), step()
    assert found["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-4)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ZeroDivisionError):
        training_step._in_triton(model, lambda: {"loss": 1 / 0})
    assert [type(module) for module in model.modules()] == kinds


def test_layers_in_triton_that_fail_are_left_out_and_said() -> None:
    def failing() -> dict[str, float]:
        raise OSError("no such chip")

    steps = {"fastrl": lambda: {"loss": 1.0, "grad_norm": 1.0}, training_step.TRITON: failing}
    assert training_step.check(steps, 1e-4) == {training_step.TRITON: "OSError: no such chip"}
    assert list(steps) == ["fastrl"]
    with pytest.raises(OSError, match="no such chip"):
        training_step.check({"another": failing}, 1e-4)


def test_what_has_too_little_memory_is_left_out_unless_it_is_the_first() -> None:
    def failing() -> dict[str, float]:
        raise torch.OutOfMemoryError("139 GiB are not enough")

    steps = {"fastrl": lambda: {"loss": 1.0, "grad_norm": 1.0}, "eager head": failing}
    assert training_step.check(steps, 1e-4) == {"eager head": "OutOfMemoryError: 139 GiB are not enough"}
    assert list(steps) == ["fastrl"]
    with pytest.raises(torch.OutOfMemoryError):
        training_step.check({"fastrl": failing}, 1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("qk_norm", [True, False])
def test_an_adapter_over_either_family_is_trained_by_all_contenders(qk_norm: bool) -> None:
    pytest.importorskip("peft")
    case = replace(CASE, shape=replace(TINY, qk_norm=qk_norm, tied=False), lora_r=2)
    model = random_model(case.shape, case.lengths, dtype=torch.float32, device="cpu", lora_r=2)
    assert type(model).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == workload(case).adapter
    assert all(p.any() for p in trained)  # with B zero, A's gradient would be zero and nobody's to compare
    records = [each for each in measured(case, device="cpu", repeats=2) if "not_timed" not in each]
    assert len(records) == 6 + (len(NAMES) if find_spec("trl") is not None else 0)


def test_peak_memory_counts_what_a_step_makes_and_no_view_of_what_was_there() -> None:
    weight = torch.ones(1024, 1024)  # 4 MiB

    def views() -> dict[str, float]:
        return {"loss": float((weight.t() @ torch.ones(1024)).sum())}

    def makes() -> dict[str, float]:
        return {"loss": float((weight * 2).sum())}

    with FakeTensorMode():
        left_over = torch.ones(8)  # as a compilation in the same process leaves them
    assert training_step.peak_gib(views, "cpu") < 0.1 / 1024
    assert left_over.shape == (8,)
    assert training_step.peak_gib(makes, "cpu") == pytest.approx(4 / 1024, rel=0.01)


def test_turns_end_with_the_time_but_two_are_always_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(training_step.time, "perf_counter", lambda: float(next(clock)))
    steps = {"a": dict, "b": dict}  # a turn of two takes four calls of the clock
    assert len(training_step.timed(steps, 9, "cpu", 0.0, {})["a"]) == 2
    assert len(training_step.timed(steps, 9, "cpu", float("inf"), {})["b"]) == 9


def test_what_runs_out_of_memory_in_its_turn_is_not_timed_and_the_others_are() -> None:
    calls = []

    def second_time_fails() -> dict[str, float]:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("140 GiB are too many")
        return {}

    reasons: dict[str, str] = {}
    found = training_step.timed({"fastrl": dict, "other": second_time_fails}, 3, "cpu", float("inf"), reasons)
    assert list(found) == ["fastrl"]
    assert len(found["fastrl"]) == 3
    assert reasons == {"other": "OutOfMemoryError: 140 GiB are too many"}
    with pytest.raises(torch.OutOfMemoryError):
        training_step.timed({"fastrl": second_time_fails}, 3, "cpu", float("inf"), {})


def test_a_trl_that_computes_something_else_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training_step, "trl_steps", lambda *_: {"TRL": lambda: {"loss": 9.0, "grad_norm": 1.0}, "TRL, patched": dict}
    )
    records = {record["contender"]: record for record in measured(CASE, device="cpu", repeats=2)}
    assert "TRL has loss 9.0" in records["TRL"]["not_timed"]
    assert records["TRL, patched"]["not_timed"] == "KeyError: 'loss'"
    assert "ms" not in records["TRL"]
    assert records["fastrl"]["ms"] > 0
    assert "not timed: RuntimeError: TRL has loss" in training_step._line(records["TRL"])


def test_a_trl_that_cannot_be_imported_is_recorded_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Failed to import trl: No module named 'psutil'")

    monkeypatch.setattr(training_step, "trl_steps", broken)
    records = {record["contender"]: record for record in measured(CASE, device="cpu", repeats=2)}
    assert records["TRL"]["not_timed"] == "RuntimeError: Failed to import trl: No module named 'psutil'"
    assert records["none of these"]["ms"] > 0


def test_an_absent_trl_is_recorded_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "trl_steps", lambda *_: {})
    records = list(measured(CASE, device="cpu", repeats=2))
    assert records[-1]["contender"] == "TRL"
    assert records[-1]["not_timed"] == "trl is not installed"


def test_half_of_the_groups_have_no_signal_and_the_cost_model_knows() -> None:
    replay = replayed(CASE)
    silent = torch.tensor([replay.advantage[replay.group == g].abs().sum() == 0 for g in range(4)])
    assert silent.tolist() == [True, True, False, False]
    assert workload(CASE).trained == 8
    assert replayed(CASE).rollouts == replay.rollouts


def test_lengths_of_a_replay_are_those_of_the_distribution() -> None:
    case = replace(CASE, prompts=64, generations=8)
    lengths = [len(each.completion_ids) for each in replayed(case).rollouts]
    assert sum(lengths) / len(lengths) == pytest.approx(case.lengths.mean(), rel=0.03)
    assert max(lengths) == case.lengths.longest


def test_the_chunk_of_the_prediction_is_the_chunk_of_the_ops() -> None:
    assert CPU_CHUNK == head.CPU_CHUNK_BYTES
    assert all(case.lengths.prompt + case.lengths.longest <= case.micro_tokens for case in CPU_CASES.values())
