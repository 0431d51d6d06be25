"""What a run is: frozen records with TRL's field names where the meaning is the same, ours in nested blocks.

Nothing here imports torch: a wrong key is refused before anything heavy is loaded. Cross-field rules live in
`fastrl.train.validate`. `None` in an algorithm's field means "as the preset says".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataBlock:
    """How rows become token sequences.

    Attributes:
        columns: new name -> name in the file, applied before anything else (`{prompt: question}`).
        prompt_template: Python format string over the row's columns that makes the prompt, for rows without one.
        completion_template: the same for the completion (SFT).
        system_prompt: put before the first message of each conversation.
        chat_template: a file with a Jinja template that replaces the tokenizer's.
        apply_chat_template: render plain prompts as one user message too.
        max_rows: use only the first rows of the file.
        skip_bad_rows: write refused rows to `rejected.jsonl` in output_dir and go on.
    """

    columns: dict[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    completion_template: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    apply_chat_template: bool = False
    max_rows: int | None = None
    skip_bad_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class PackingBlock:
    """How sequences are cut into micro-batches. It changes speed and memory, never the result.

    Attributes:
        token_budget: most tokens of one packed micro-batch.
    """

    token_budget: int = 8192


@dataclass(frozen=True, kw_only=True)
class RolloutBlock:
    """How completions are sampled.

    Attributes:
        batch_size: most prompts decoded together by the built-in engine.
        max_prompt_length: prompts with more tokens are refused; None allows what the model's context holds.
    """

    batch_size: int = 256
    max_prompt_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class KernelsBlock:
    """Which implementation of the ops runs.

    Attributes:
        backend: "torch", "native" or "triton" for all that is computed over the head; None lets each op choose.
        chunk_rows: rows of the head's logits alive at once; None chooses by a memory budget.
        skip_tolerance: share of the gradient that certified skipping may leave out; 0 is exact.
    """

    backend: Literal["reference", "torch", "triton"] | None = None
    chunk_rows: int | None = None
    skip_tolerance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReportBlock:
    """What a run shows.

    Attributes:
        panel: draw the live terminal panel when the output is a terminal.
        log_completions: rollouts per logged step written to completions.jsonl.
        to: extra trackers.
    """

    panel: bool = True
    log_completions: int = 4
    to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()


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
            gradient_accumulation_steps is the optimizer step's batch. Memory is set by packing.token_budget.
        gradient_accumulation_steps: batches of per_device_train_batch_size in one optimizer step.
        learning_rate: AdamW's, at the end of warm-up.
        lr_scheduler_type: shape of the learning rate after warm-up.
        warmup_steps: steps in which the learning rate grows linearly from 0.
        warmup_ratio: share of the steps spent warming up, when warmup_steps is 0.
        weight_decay: AdamW's, of matrices; norms and biases do not decay.
        adam_beta1, adam_beta2: decay of AdamW's running mean of the gradient and of its square.
        adam_epsilon: added to the root of the running mean of squares.
        max_grad_norm: gradients with a larger global norm are scaled down to it; 0 never scales.
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


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning.

    Attributes:
        completion_only_loss: train on completion tokens only (prompt-completion data).
        assistant_only_loss: train on assistant turns only (messages data).
        label_smoothing: share of the target's probability spread over the vocabulary.
        max_length: sequences with more tokens are refused, or cut when truncate is set.
        truncate: cut over-long sequences on the right instead of refusing them; the count is logged.
    """

    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    label_smoothing: float = 0.0
    max_length: int | None = 1024
    truncate: bool = False


@dataclass(frozen=True, kw_only=True)
class SamplerCorrectionBlock:
    """Correction for a sampler whose log-probabilities differ from the trainer's (objectives.md, "Surrogates").

    Attributes:
        mode: "none"; "truncate" (TIS: min(ratio, high)); "mask" (icepop: 0 outside [low, high]);
            "sequence_mask" (0 for the whole sequence when its ratio exceeds high).
        low: smallest ratio kept by "mask".
        high: cap or largest ratio kept.
    """

    mode: Literal["none", "truncate", "mask", "sequence_mask"] = "none"
    low: float = 0.5
    high: float = 3.0


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingBlock:
    """DAPO's dynamic sampling: replace groups without signal (all rewards equal).

    Attributes:
        max_rounds: extra rounds of sampling a step may take; 0 turns it off.
    """

    max_rounds: int = 0


@dataclass(frozen=True, kw_only=True)
class OverlongBlock:
    """DAPO's soft overlong punishment: 0 until `max_completion_length - buffer`, then linear down to -penalty.

    Attributes:
        buffer: tokens before the limit in which the punishment grows; 0 turns it off.
        penalty: the punishment at the limit, in units of reward.
    """

    buffer: int = 0
    penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(TrainConfig):
    """Group-relative policy optimisation and its family; the preset fills every field left at None.

    Attributes:
        algorithm: preset (docs/algorithms.md prints each as a record).
        parity: take another system's exact constants instead of the preset's.
        reward_funcs: names of built-in rewards, or `package.module:function`.
        reward_weights: one per reward function; None weighs all by 1.
        num_generations: completions per prompt (G).
        max_completion_length: most tokens of a completion.
        temperature: divides the logits when sampling and when training.
        top_p: sample from the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: sample from the k most likely tokens; 0 keeps all.
        min_p: drop tokens below this share of the most likely token's probability; 0 keeps all.
        repetition_penalty: makes tokens that occurred already less likely; 1 is none.
        stop: texts that end a completion.
        steps_per_generation: optimizer steps a generated batch is cut into.
        num_iterations: passes over each generated batch (mu).
        beta: KL coefficient; 0 needs no reference model.
        kl_estimator: which estimator of the KL to the reference.
        kl_placement: whether the KL enters the loss or the reward.
        epsilon: the ratio is clipped at 1 - epsilon, and at 1 + epsilon when epsilon_high is not set.
        epsilon_high: the ratio is clipped at 1 + epsilon_high; cispo caps the ratio itself at it.
        delta: cap of the ratio before the minimum, for negative advantages.
        loss_type: how tokens are averaged: "grpo" per sequence, "dapo" over all tokens, "dr_grpo" by a constant,
            "bnpo" is another word TRL uses for "dapo" on one device.
        scale_rewards: divide centred rewards by the group's or the batch's standard deviation, or not.
        importance_sampling_level: ratio per token, or per sequence (GSPO).
        entropy_coef: weight of the entropy bonus.
        top_entropy_quantile: share of trained tokens, those of highest entropy, that keep a policy gradient.
        mask_truncated_completions: truncated completions leave the loss (DAPO's overlong filtering).
        keep_masked_denominator: completions so masked still count in the denominator of the average (TRL), instead
            of leaving it (verl).
        target_kl: stop the remaining updates of a batch when the mean KL to the sampling policy exceeds it.
        adaptive_kl_target: steer beta towards this KL to the reference; None keeps beta fixed.
        sampler_correction: correction for a sampler that differs from the trainer.
        dynamic_sampling: replacing groups without signal.
        overlong: soft punishment of long completions.
        rollout: how completions are sampled.
    """

    algorithm: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "sapo"] = "grpo"
    parity: Literal["trl", "verl", "openrlhf", "open_instruct"] | None = None
    learning_rate: float = 1e-6
    reward_funcs: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] | None = None
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    steps_per_generation: int = 1
    num_iterations: int = 1
    beta: float | None = None
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    kl_placement: Literal["loss", "reward"] | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo"] | None = None
    scale_rewards: Literal["group", "batch", "none"] | None = None
    importance_sampling_level: Literal["token", "sequence"] | None = None
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    mask_truncated_completions: bool = False
    keep_masked_denominator: bool = False
    target_kl: float | None = None
    adaptive_kl_target: float | None = None
    sampler_correction: SamplerCorrectionBlock = SamplerCorrectionBlock()
    dynamic_sampling: DynamicSamplingBlock = DynamicSamplingBlock()
    overlong: OverlongBlock = OverlongBlock()
    rollout: RolloutBlock = RolloutBlock()


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
        reward_funcs: names of built-in rewards, or `package.module:function`.
        output_dir: where the completions and the result go; None prints the result only.
    """

    eval_dataset: str
    reward_funcs: tuple[str, ...]
    output_dir: str | None = None
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(InferenceConfig):
    """Completions of one or more prompts.

    Attributes:
        prompts: texts on the command line.
        prompt_file: JSONL or parquet with a `prompt` column.
        output_file: JSONL to write; standard output when None.
        min_p: drop tokens below this share of the most likely token's probability; 0 keeps all.
        repetition_penalty: makes tokens that occurred already less likely; 1 is none.
        stop: texts that end a completion.
    """

    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    output_file: str | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()


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
