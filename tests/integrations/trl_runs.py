"""Ten steps of TRL's trainers on a tiny model that is made here: what each logs and the weights it ends with."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from fastrl.train.tiny import make_tiny_qwen3
from tests.parity.setting import make_tokenizer, visited_rows

STEPS = 10
Log = list[dict[str, Any]]  # numbers; TRL logs None where nothing was scored
Run = tuple[Log, dict[str, torch.Tensor]]
CONFIGS = {
    SFTTrainer: (SFTConfig, "sft"),
    DPOTrainer: (DPOConfig, "dpo"),
    KTOTrainer: (KTOConfig, "kto"),
    GRPOTrainer: (GRPOConfig, "sft"),
    RLOOTrainer: (RLOOConfig, "sft"),
}
ONLINE = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 12,
    "steps_per_generation": 2,  # the second step is off policy
    "shuffle_dataset": False,
}
NOT_COMPARED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "total_flos"}


def written_model(folder: str | Path) -> Any:
    """A Qwen3 of 7000 parameters, loaded from a folder, where TRL finds its reference model."""
    tokenizer = make_tokenizer()
    made = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=16,
        layers=2,
        intermediate_size=32,
        context=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=1,
    )
    made.save_pretrained(Path(folder) / "model")
    return AutoModelForCausalLM.from_pretrained(Path(folder) / "model")


def reward(completions: list[Any], **columns: Any) -> list[float | None]:
    """Share of digits."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / (1 + len(text)) for text in texts]


def trainer(
    kind: Any,
    folder: str | Path,
    *,
    ref_model: Any = None,
    peft_config: Any = None,
    judge: Callable[..., list[float | None]] = reward,
    prompts: list[str] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of `kind`, TRL's or a subclass, on rows that are always the same; `judge` and `prompts` are online."""
    base = next(each for each in kind.__mro__ if each in CONFIGS)
    config, rows = CONFIGS[base]
    is_online = base in (GRPOTrainer, RLOOTrainer)
    options = {"per_device_train_batch_size": 4} | (ONLINE if is_online else {}) | settings
    arguments = config(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3, "bf16": False, "seed": 3}
        | {"gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 5}
        | options,
    )
    data = visited_rows(rows)
    if is_online:
        data = [{"prompt": each} for each in prompts or [row["prompt"] for row in data]]
    extra: dict[str, Any] = {"reward_funcs": judge} if is_online else {}
    if base in (DPOTrainer, KTOTrainer):
        extra["ref_model"] = ref_model
    made = kind(
        model=written_model(folder),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:8]),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        **extra,
    )
    made.remove_callback(PrinterCallback)
    return made


def run(kind: Any, **settings: Any) -> Run:
    """Train and return the log, without times, and the weights that were trained."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(kind, folder, **settings)
        made.train()
        log = [
            {name: value for name, value in line.items() if name not in NOT_COMPARED and not name.endswith("_runtime")}
            for line in made.state.log_history
        ]
        weights = {name: x.detach().clone() for name, x in made.model.named_parameters() if x.requires_grad}
    return log, weights


def largest_differences(ours: Run, theirs: Run) -> dict[str, float]:
    """Of losses (training and evaluation), other metrics and weights; absolute, metrics relative to 1 + |value|.

    TRL logs None where nothing was scored. That, and NaN, is equal to itself and infinitely far from a number.
    """
    assert len(ours[0]) == len(theirs[0])
    found = {"loss": 0.0, "metrics": 0.0, "weights": 0.0}
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if name.endswith("_per_second") or (name == "rewards/accuracies" and _is_of_zeros(other)):
                continue
            group = "loss" if name in ("loss", "eval_loss", "train_loss") else "metrics"
            gap = _gap(mine[name], value)
            found[group] = max(found[group], gap if group == "loss" or gap in (0, math.inf) else gap / (1 + abs(value)))
    assert ours[1].keys() == theirs[1].keys()
    for name, x in theirs[1].items():
        found["weights"] = max(found["weights"], _gap(float((ours[1][name] - x).abs().max()), 0.0))
    return found


def _is_of_zeros(line: dict[str, float]) -> bool:
    """Whether policy and reference are still one, so that rounding chooses which of two zero rewards is larger."""
    return abs(line["rewards/chosen"]) + abs(line["rewards/rejected"]) < 1e-6


def _gap(one: float | None, other: float | None) -> float:
    first, second = (math.nan if value is None else value for value in (one, other))
    if math.isnan(first) or math.isnan(second):
        return 0.0 if math.isnan(first) and math.isnan(second) else math.inf
    return abs(first - second)
