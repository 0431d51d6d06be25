"""PPO with environments: episodes of a tiny model, their observations neither trained nor valued."""

from __future__ import annotations

from pathlib import Path

from fastrl.recipes import ppo
from fastrl.report import read_completions
from fastrl.train.config import EnvironmentBlock, PPOConfig, ReportBlock
from tests.recipes.agents import make_agent_base
from tests.recipes.runs import metrics_of


def test_episodes_are_trained_by_ppo(tmp_path: Path) -> None:
    model, prompts = make_agent_base(tmp_path)
    config = PPOConfig(
        model_name_or_path=str(model),
        train_dataset=str(prompts),
        eval_dataset=str(prompts),
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=12,
        num_mini_batches=1,
        max_completion_length=160,
        environment=EnvironmentBlock(
            factory="tests.recipes.agent_environments:Shouting", max_tool_calling_iterations=3, workers=0
        ),
        report=ReportBlock(panel=False, log_completions=12),
    )
    # The first update of a round compares the sampler's log-probabilities with the trainer's, and would stop.
    assert ppo.run(config) == 0
    first, *_, last = metrics_of(tmp_path / "run")
    assert first["tools/call_frequency"] > 0
    assert 0 <= first["rewards/Shouting/mean"] <= 1
    assert last["eval/tools/call_frequency"] > 0  # the held-out prompts are played, too
    samples = [sample for _, sample in read_completions(tmp_path / "run" / "completions.jsonl")]
    assert any(message["role"] == "tool" for sample in samples for message in sample.completion)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "[tool] &lt;script&gt;" in report  # and nothing that a tool says acts in the report
    assert "<script" not in report
    assert "\x1b" not in report
