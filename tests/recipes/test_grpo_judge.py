"""A GRPO run that an LLM judge rewards: its counters are in the log, its key is nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrl.rewards.judge_config import Budget, Price
from fastrl.rewards.judge_ledger import Ledger
from tests.recipes.runs import Base, column, run_grpo
from tests.rewards.judge_server import answers_of, serving, verdict

CANARY = "sk-canary-fedcba9876543210"


def test_a_judge_rewards_a_run_within_its_budget_and_its_key_stays_home(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    path, ledger = tmp_path / "judge.yaml", tmp_path / "judge.sqlite"
    with serving(lambda request: verdict(request, scores={"score": len(set(answers_of(request)[-1]))})) as served:
        content = {"base_url": served.base_url, "model": "m", "ledger": str(ledger), "api_key_env": "JUDGE_KEY"}
        path.write_text(json.dumps(content | {"budget": {"calls": 12}, "scale": [0, 20]}))
        lines = run_grpo(base, tmp_path / "run", reward_funcs=(f"judge(config='{path}')",), max_steps=2)
        assert set(served.keys) == {f"Bearer {CANARY}"}
        assert len(served.requests) <= 12
    assert column(lines, "judge/spent_calls")[-1] == len(served.requests)
    assert sum(column(lines, "judge/calls")) == len(served.requests)
    assert column(lines, "rewards/judge/mean")
    spent = Ledger(str(ledger), Budget(), Price())
    assert spent.spent().calls == len(served.requests)
    spent.close()
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or CANARY.encode() not in file.read_bytes(), file
