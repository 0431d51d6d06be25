"""Cross-field rules of the recipes that train scoring models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.train.config import DataBlock, PackingBlock, PRMConfig, RewardConfig
from fastrl.train.validate import problems

SHORT = "packing.token_budget: 512 cannot hold one sequence of max_length 1024"
TEMPLATE = "data.completion_template: has no effect here"


@pytest.fixture(autouse=True)
def _inside_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "data.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "start"),
    [
        (RewardConfig, {"packing": PackingBlock(token_budget=512)}, SHORT),
        (RewardConfig, {"data": DataBlock(completion_template="{x}")}, TEMPLATE),
        (RewardConfig, {"center_rewards_coefficient": -0.1}, "center_rewards_coefficient: must be in [0, inf)"),
        (PRMConfig, {"packing": PackingBlock(token_budget=512)}, SHORT),
        (PRMConfig, {"data": DataBlock(completion_template="{x}")}, TEMPLATE),
        (PRMConfig, {"step_separator": ""}, "step_separator: is empty"),
        (PRMConfig, {"aggregation": "last"}, "aggregation: has no effect without eval_dataset"),
    ],
)
def test_a_broken_rule_is_one_line(kind: Any, changes: dict[str, Any], start: str) -> None:
    config = kind(model_name_or_path="model", output_dir="run", train_dataset="data.jsonl")
    assert problems(config) == []
    (line,) = problems(replace(config, **changes))
    assert line.startswith(start)
