"""What sampling ahead cannot be combined with, each in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrl.train.config import EnvironmentBlock, GenerateConfig, GRPOConfig, PPOConfig, RolloutBlock
from fastrl.train.validate_ahead import ahead_problems


def grpo(block: RolloutBlock, **changes: Any) -> GRPOConfig:
    return GRPOConfig(
        model_name_or_path="model", output_dir="out", train_dataset="data.jsonl", rollout=block, **changes
    )


AHEAD = RolloutBlock(max_staleness=2, segment_tokens=64, timeout_seconds=60.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            lambda: grpo(RolloutBlock(segment_tokens=8)),
            "rollout.segment_tokens: has no effect while rollout.max_staleness is 0; set that, or remove this",
        ),
        (
            lambda: grpo(RolloutBlock(timeout_seconds=8)),
            "rollout.timeout_seconds: has no effect while rollout.max_staleness is 0; set that, or remove this",
        ),
        (
            lambda: grpo(RolloutBlock(max_staleness=1, engine="vllm")),
            "rollout.max_staleness: vLLM in the trainer's own process samples and learns in turns; set rollout.engine "
            "to vllm_server, whose process is another, or max_staleness to 0",
        ),
        (
            lambda: grpo(AHEAD, load_in_4bit=True),
            "rollout.max_staleness: the built-in engine samples ahead in a process of its own, which cannot map 4-bit "
            "weights; set load_in_4bit to false, or max_staleness to 0",
        ),
        (
            lambda: grpo(AHEAD, environment=EnvironmentBlock(tools=("calculator",))),
            "rollout.segment_tokens: episodes with tools are sampled turn by turn; remove it",
        ),
        (
            lambda: PPOConfig(
                model_name_or_path="model", output_dir="out", train_dataset="data.jsonl", rollout=AHEAD, reward_funcs=()
            ),
            "rollout.max_staleness: only grpo and its algorithms sample ahead, because they correct for the weights "
            "that sampled; remove it",
        ),
        (
            lambda: GenerateConfig(model_name_or_path="model", rollout=RolloutBlock(max_staleness=1)),
            "rollout.max_staleness: only grpo and its algorithms sample ahead, because they correct for the weights "
            "that sampled; remove it",
        ),
    ],
    ids=["segments", "deadline", "vllm", "four bits", "tools", "ppo", "generate"],
)
def test_what_does_not_go_together_is_refused_in_words(config: Callable[[], Any], expected: str) -> None:
    assert list(ahead_problems(config())) == [expected]


def test_what_goes_together_is_let_through(tmp_path: Path) -> None:
    assert list(ahead_problems(grpo(AHEAD))) == []
    assert list(ahead_problems(grpo(RolloutBlock()))) == []
    assert (
        list(ahead_problems(grpo(RolloutBlock(max_staleness=1), environment=EnvironmentBlock(tools=("python",))))) == []
    )


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    (problem,) = ahead_problems(grpo(AHEAD))
    assert problem.startswith("rollout.max_staleness: one trainer process samples ahead")
