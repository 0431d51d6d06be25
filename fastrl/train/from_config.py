"""What every recipe with an optimizer makes from its configuration in the same way."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from fastrl.report.journal import Journal
from fastrl.train.config import TrainConfig
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.distributed import is_first
from fastrl.train.lora import add_lora
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.run_directory import RunDirectory
from fastrl.train.score_model import has_score_head, load_score_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenizer_of(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Read the tokenizer beside the model, with the chat template the run names."""
    return load_tokenizer(
        config.model_name_or_path, chat_template=config.data.chat_template, trust_remote_code=config.trust_remote_code
    )


def model_of(config: TrainConfig, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Read the causal language model that the run trains: with a fresh adapter when it is LoRA that trains.

    Args:
        gradient_checkpointing: keep each layer's input alone and compute the rest again.
    """
    model = _base_of(config, gradient_checkpointing=gradient_checkpointing)
    add_lora_of(config, model)
    return model


def score_model_of(config: TrainConfig) -> PreTrainedModel:
    """Read a model with a scalar head that the run trains: the head of a reward model's directory, else a fresh one.

    With LoRA the adapter and the head train.
    """
    path = config.model_name_or_path
    model = load_score_model(
        path,
        dtype=compute_dtype(config.dtype),
        device=pick_device(config.device),
        attn_implementation=config.attn_implementation,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        load_in_4bit=config.load_in_4bit,
        layers=config.kernels.layers,
        new_head=None if has_score_head(path) else 1.0,
        seed=config.seed,
    )
    add_lora_of(config, model)
    model.score.requires_grad_(True)
    return model


def reference_of(config: TrainConfig, policy: PreTrainedModel) -> PreTrainedModel:
    """The frozen start of a policy that `model_of` made: run it inside `with adapter_off(reference):`.

    Returns:
        With LoRA the policy itself, whose adapter that block turns off; else a second model.
    """
    return policy if config.use_peft else _base_of(config, gradient_checkpointing=False).requires_grad_(False)


def add_lora_of(config: TrainConfig, model: PreTrainedModel) -> None:
    """Freeze a model and add the adapter that the run trains; nothing happens without use_peft."""
    if config.use_peft:
        add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            seed=config.seed,
            target_modules=config.lora_target_modules,
        )


def _base_of(config: TrainConfig, *, gradient_checkpointing: bool) -> PreTrainedModel:
    return load_model(
        config.model_name_or_path,
        dtype=compute_dtype(config.dtype),
        device=pick_device(config.device),
        attn_implementation=config.attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        load_in_4bit=config.load_in_4bit,
        layers=config.kernels.layers,
    )


def optimizer_of(config: TrainConfig, model: nn.Module) -> MasterAdamW:
    """AdamW over the parameters of `model` that require a gradient."""
    return MasterAdamW(
        model,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        is_sharded=config.distributed.shard == "optimizer",
    )


def journal_of(config: TrainConfig, directory: RunDirectory, *, title: str, total_steps: int) -> Journal:
    """The run's log, which the caller opens with `with`; only the first rank's writes."""
    return Journal(
        directory.path,
        title=title,
        total_steps=total_steps,
        live=config.report.panel,
        trackers=config.report.to,
        config=asdict(config),
        is_silent=not is_first(),
    )
