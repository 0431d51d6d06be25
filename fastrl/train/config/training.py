"""The fields that every recipe with an optimizer shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.blocks import DataBlock, KernelsBlock, PackingBlock, ReportBlock
from fastrl.train.config.distributed import DistributedBlock


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The fields every training recipe shares; names and meanings as in TRL and transformers.

    Attributes:
        model_name_or_path: directory in the Hugging Face layout (config, safetensors, tokenizer).
        output_dir: run directory; a used one needs resume_from_checkpoint or another name.
        train_dataset: JSONL or parquet file.
        eval_dataset: held-out file of the same format.
        seed: of the data order and every sample.
        max_steps: optimizer steps; -1 trains num_train_epochs.
        num_train_epochs: passes over the data when max_steps is -1.
        per_device_train_batch_size: sequences a device contributes to one accumulation step; the product with
            gradient_accumulation_steps and the number of devices (the ranks that torchrun starts) is the optimizer
            step's batch. Memory is set by packing.token_budget.
        gradient_accumulation_steps: batches of per_device_train_batch_size in one optimizer step.
        learning_rate: AdamW's, at the end of warm-up.
        lr_scheduler_type: shape of the learning rate after warm-up.
        warmup_steps: steps in which the learning rate grows linearly from 0.
        warmup_ratio: share of the steps spent warming up, when warmup_steps is 0.
        weight_decay: AdamW's, of matrices; norms and biases do not decay.
        adam_beta1, adam_beta2: decay of AdamW's running mean of the gradient and of its square.
        adam_epsilon: added to the root of the running mean of squares.
        max_grad_norm: gradients with a larger global norm are scaled down to it; 0 never scales.
        use_peft: train a LoRA adapter and leave the weights of the model alone.
        lora_r: rank of the adapter.
        lora_alpha: the adapter's product is scaled by lora_alpha / lora_r.
        lora_target_modules: linear layers with an adapter, such as q_proj; all-linear is all below the head.
        load_in_4bit: keep the frozen model's linear layers in 4 bits (QLoRA); needs use_peft.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        dtype: compute precision; master weights and optimizer state are float32.
        device: where to train; auto takes a GPU when there is one.
        attn_implementation: attention over packed sequences; auto is torch's varlen kernel on CUDA, else sdpa.
        trust_remote_code: run Python code that comes with the model.
        logging_steps: steps between lines on the terminal and to the trackers; metrics.jsonl has every step.
        save_steps: steps between checkpoints.
        save_total_limit: newest checkpoints kept; None keeps all.
        eval_steps: steps between evaluations on eval_dataset.
        resume_from_checkpoint: a checkpoint directory, or "auto" for the newest whole one (a fresh start when none).
        on_nonfinite: what a non-finite loss or gradient norm does: "halt" the run or "skip" the step.
        data: how rows become token sequences.
        packing: how sequences are cut into micro-batches.
        kernels: which implementation of the ops runs.
        report: what the run shows.
        distributed: how ranks share the work.
    """

    model_name_or_path: str
    output_dir: str
    train_dataset: str
    eval_dataset: str | None = None
    seed: int = 42
    max_steps: int = -1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-5
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "varlen", "flash"] = "auto"
    trust_remote_code: bool = False
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int | None = None
    eval_steps: int | None = None
    resume_from_checkpoint: str | None = None
    on_nonfinite: Literal["halt", "skip"] = "halt"
    data: DataBlock = DataBlock()
    packing: PackingBlock = PackingBlock()
    kernels: KernelsBlock = KernelsBlock()
    report: ReportBlock = ReportBlock()
    distributed: DistributedBlock = DistributedBlock()
