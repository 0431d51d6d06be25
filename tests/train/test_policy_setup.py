"""What is checked before a policy is sampled from."""

from __future__ import annotations

import pytest

from fastrl.train.config import GRPOConfig, RolloutBlock, ServerBlock, VLLMBlock
from fastrl.train.policy_setup import check_lengths, served_context
from fastrl.train.prompts import Prompt


def config(rollout: RolloutBlock) -> GRPOConfig:
    return GRPOConfig(model_name_or_path="", output_dir="", train_dataset="", max_completion_length=4, rollout=rollout)


@pytest.mark.parametrize(
    ("rollout", "context"),
    [
        (RolloutBlock(), 64),
        (RolloutBlock(engine="vllm", vllm=VLLMBlock(max_model_len=8)), 8),
        (RolloutBlock(engine="vllm_server", server=ServerBlock(max_model_len=8)), 8),
        (RolloutBlock(engine="vllm_server", server=ServerBlock(max_model_len=100)), 64),
    ],
)
def test_a_sequence_is_as_long_as_the_model_and_the_engine_allow(rollout: RolloutBlock, context: int) -> None:
    assert served_context(config(rollout), 64) == context


def test_a_prompt_without_room_in_the_engines_context_is_refused() -> None:
    rollout = RolloutBlock(engine="vllm_server", server=ServerBlock(max_model_len=8))
    with pytest.raises(ValueError, match=r"longest prompt has 8 tokens, which leaves no room .* context of 8"):
        check_lengths(config(rollout), [Prompt((5,) * 8, "", {})], context=64)
