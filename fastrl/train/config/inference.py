"""The recipes that only sample, and the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.blocks import DataBlock, RewardsBlock, RolloutBlock
from fastrl.train.config.environment import EnvironmentBlock


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """The fields of the recipes that only sample.

    Attributes:
        model_name_or_path: directory in the Hugging Face layout (config, safetensors, tokenizer).
        num_generations: completions per prompt.
        max_completion_length: most tokens of a completion.
        temperature: divides the logits; 0 is greedy.
        top_p: sample from the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: sample from the k most likely tokens; 0 keeps all.
        seed: of every sample.
        dtype: precision of the weights.
        device: where to run; auto takes a GPU when there is one.
        trust_remote_code: run Python code that comes with the model.
        data: how rows become prompts.
        rollout: how completions are sampled.
    """

    model_name_or_path: str
    num_generations: int = 1
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    data: DataBlock = DataBlock()
    rollout: RolloutBlock = RolloutBlock()


@dataclass(frozen=True, kw_only=True)
class EvalConfig(InferenceConfig):
    """Accuracy of a model on held-out prompts, with its sampling error.

    Attributes:
        eval_dataset: JSONL or parquet file of prompts.
        reward_funcs: names of built-in rewards, or `package.module:function`; an environment that judges itself needs
            none.
        output_dir: where the completions and the result go; None prints the result only.
        rewards: how reward functions run.
        environment: tools that the model may call; its own reward is one more.
    """

    eval_dataset: str
    reward_funcs: tuple[str, ...] = ()
    output_dir: str | None = None
    temperature: float = 0.0
    rewards: RewardsBlock = RewardsBlock()
    environment: EnvironmentBlock = EnvironmentBlock()


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(InferenceConfig):
    """Completions of prompts; with `verify`, a dataset of those that pass.

    Attributes:
        prompts: texts on the command line.
        prompt_file: JSONL or parquet with a `prompt` column.
        output_file: JSONL to write, with its origin beside it; standard output when None.
        verify: reward functions whose sum decides, named as in reward_funcs, and `environment` for what the
            environment itself says; none writes every completion.
        verify_threshold: smallest sum that passes.
        output_format: rows written under verify: "sft" keeps what passes (1 per prompt is best-of-n), "preference"
            pairs it with what fails, "unpaired" labels both.
        max_per_prompt: most rows of a prompt; None keeps all distinct ones.
        min_p: drop tokens below this share of the most likely token's probability; 0 keeps all.
        repetition_penalty: makes tokens that occurred already less likely; 1 is none.
        stop: texts that end a completion.
        rewards: how the reward functions of verify run.
        environment: tools that the model may call; completions are then messages.
    """

    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    output_file: str | None = None
    verify: tuple[str, ...] = ()
    verify_threshold: float = 1.0
    output_format: Literal["sft", "preference", "unpaired"] = "sft"
    max_per_prompt: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    rewards: RewardsBlock = RewardsBlock()
    environment: EnvironmentBlock = EnvironmentBlock()


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The two-minute proof: a tiny model made on the spot, SFT, then GRPO with a verifiable reward.

    Attributes:
        seed: of the model, the data and every sample.
        output_dir: where the models and the logs go.
        json: print one JSON object as the last line.
    """

    seed: int = 0
    output_dir: str = "runs/demo"
    json: bool = False
