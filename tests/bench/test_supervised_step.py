"""The steps of SFT and DPO: every contender takes the same one."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from bench import supervised_step
from bench.supervised_step import CPU_CASES, Case, examples, measured

TINY = {
    method: replace(
        CPU_CASES[f"{method}, D=256, V=8192"],
        shape=replace(CPU_CASES["sft, D=256, V=512"].shape, hidden=64, layers=1, intermediate=128, heads=2, kv_heads=1),
        rows=6,
        micro_tokens=300,
    )
    for method in ("sft", "dpo")
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own name for it
@pytest.mark.parametrize("method", TINY)
def test_contenders_take_the_same_step_and_are_all_timed(method: str) -> None:
    records = list(measured(TINY[method], device="cpu", repeats=2))
    found = {record["contender"]: record for record in records if "not_timed" not in record}
    expected = {"sft": {"fastrl", "eager head", "no packing", "neither"}, "dpo": {"fastrl", "eager head"}}[method]
    if find_spec("trl") is not None:
        expected |= {"TRL", "TRL, patched"}
    assert found.keys() == expected
    assert all(record["ms"] > 0 and record["tokens_per_second"] > 0 for record in found.values())


def test_a_contender_with_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised_step, "EAGER", supervised_step.DEFAULT)
    monkeypatch.setattr(supervised_step, "_trl_steps", lambda *_: {"another": lambda: {"loss": 1.0, "grad_norm": 1.0}})
    records = {record["contender"]: record for record in measured(TINY["sft"], device="cpu", repeats=2)}
    assert records["another"]["not_timed"].startswith("RuntimeError: another has loss 1.0")
    assert "ms" not in records["another"]


def test_a_pair_shares_its_prompt_and_lengths_are_spread() -> None:
    case: Case = CPU_CASES["dpo, D=256, V=8192"]
    rows = examples(case)
    n = case.lengths.prompt
    assert all(chosen.ids[:n] == rejected.ids[:n] for chosen, rejected in zip(rows[::2], rows[1::2], strict=True))
    assert len({row.ids[:n] for row in rows}) == case.rows // 2
    trained = torch.tensor([float(sum(row.is_trained)) for row in rows])
    assert trained.max() > 3 * trained.min()
