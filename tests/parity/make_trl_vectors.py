"""Writes `vectors/METHOD.npz`: what TRL's own trainers make of twenty optimizer steps.

    make parity-vectors PEERS=path/to/python        an environment with fastrl, trl==1.16.0 and datasets

Each file has the loss and the metrics of every step and the weights after the last, from float32 on one CPU core.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.parity.setting import (
    METRICS,
    OPTIMIZER,
    OPTIONS,
    STEPS,
    VECTORS,
    make_model,
    make_tokenizer,
    visited_rows,
    write_models,
)

# method -> module, prefix of trainer and configuration, options that go by other names there
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("trl", "SFT", {}),
    "dft": ("trl", "SFT", {}),
    "dpo": ("trl", "DPO", {"loss_type": "sigmoid"}),
    "tr_dpo": ("trl", "DPO", {"loss_type": "sigmoid"}),
    "ipo": ("trl", "DPO", {"loss_type": "ipo"}),
    "rpo": ("trl", "DPO", {"loss_type": ["sigmoid_norm", "apo_zero", "sft"]}),
    "kto": ("trl", "KTO", {}),
    "orpo": ("trl.experimental.orpo", "ORPO", {}),
    "cpo": ("trl.experimental.cpo", "CPO", {"loss_type": "sigmoid"}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo"}),
    "reward": ("trl", "Reward", {}),
    "gkd": ("trl.experimental.gkd", "GKD", {}),
}


class Recorder(TrainerCallback):
    """Keeps what the trainer logs at each step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """Called by transformers after every step; the last call has the run's summary instead."""
        if logs is not None and "loss" in logs:
            self.lines.append(logs)


def main() -> None:
    """Make every file anew, or those of the methods named on the command line."""
    torch.set_num_threads(1)
    VECTORS.mkdir(exist_ok=True)
    start = first_weights()
    np.savez_compressed(VECTORS / "start.npz", **start)
    with tempfile.TemporaryDirectory() as scratch:
        models = write_models(Path(scratch), start)
        for method in sys.argv[1:] or TRAINERS:
            np.savez_compressed(VECTORS / f"{method}.npz", **trained(method, models, Path(scratch)))


def first_weights() -> dict[str, Any]:
    """Random weights of the language model, and of the reward model's head."""
    weights = {name: parameter.detach().numpy() for name, parameter in make_model().named_parameters()}
    head = torch.randn(1, 16, generator=torch.Generator().manual_seed(2)) / 4
    return weights | {"score.weight": head.numpy()}


def trained(method: str, models: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """Run TRL's trainer; return its losses, metrics and last weights."""
    module, prefix, extra = TRAINERS[method]
    trl = importlib.import_module(module)
    config = getattr(trl, f"{prefix}Config")(
        output_dir=str(scratch / method),
        **(OPTIMIZER | OPTIONS[method] | extra),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
    )
    if method == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(models["scorer"], num_labels=1, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(models["policy"], dtype=torch.float32)
    rows, more = visited_rows(method), {}
    if method == "gkd":
        more = {"teacher_model": AutoModelForCausalLM.from_pretrained(models["teacher"], dtype=torch.float32)}
        rows = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    recorder = Recorder()
    trainer = getattr(trl, f"{prefix}Trainer")(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        callbacks=[recorder],
        **more,
    )
    trainer.train()
    assert len(recorder.lines) == STEPS
    names = ("loss", "grad_norm", *METRICS[method])
    columns = {f"log/{name}": np.array([line.get(name, np.nan) for line in recorder.lines]) for name in names}
    weights = {f"weight/{name}": parameter.detach().numpy() for name, parameter in trainer.model.named_parameters()}
    made_by = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers", "torch"))
    return columns | weights | {"made_by": np.array(made_by)}


if __name__ == "__main__":
    main()
