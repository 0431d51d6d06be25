"""Ten steps of TRL's trainers on a tiny model that is made here: what each logs and the weights it ends with."""

from __future__ import annotations

import math
import tempfile
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
Run = tuple[list[dict[str, float]], dict[str, torch.Tensor]]
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


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """Share of digits."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / (1 + len(text)) for text in texts]


def trainer(kind: Any, folder: str | Path, *, ref_model: Any = None, peft_config: Any = None, **settings: Any) -> Any:
    """A trainer of `kind`, TRL's or a subclass, on rows that are always the same."""
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
        data = [{"prompt": row["prompt"]} for row in data]
    extra: dict[str, Any] = {"reward_funcs": reward} if is_online else {}
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
    """Of losses (training and evaluation), other metrics and weights; absolute, metrics relative to 1 + |value|."""
    assert len(ours[0]) == len(theirs[0])
    found = {"loss": 0.0, "metrics": 0.0, "weights": 0.0}
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if name.endswith("_per_second") or (math.isnan(value) and math.isnan(mine[name])):
                continue
            group = "loss" if name in ("loss", "eval_loss", "train_loss") else "metrics"
            scale = 1.0 if group == "loss" else 1 + abs(value)
            found[group] = max(found[group], abs(mine[name] - value) / scale)
    assert ours[1].keys() == theirs[1].keys()
    for name, x in theirs[1].items():
        found["weights"] = max(found["weights"], float((ours[1][name] - x).abs().max()))
    return found
