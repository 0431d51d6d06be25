"""Distillation: learning from what a larger model thinks of every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.blocks import DataBlock, PackingBlock, RolloutBlock
from fastrl.train.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Distillation from a teacher on fixed rows, live or from stored top-k log-probabilities.

    Attributes:
        teacher_model_name_or_path: directory of the teacher, which must read the same tokens.
        teacher_logprobs: file that `fastrl teacher` wrote, in place of a live teacher.
        teacher_dtype: precision of the teacher; None is that of the student.
        loss: forward_kl covers what the teacher does, reverse_kl keeps to its favourites, jsd lies between.
        beta: where between: weight of the teacher in the mixture of jsd; None is 0.5.
        temperature: divides both models' logits in the divergence.
        alpha: share of the rows' own negative log-likelihood, at temperature 1, in the loss.
        completion_only_loss: train on completion tokens only (prompt-completion data).
        assistant_only_loss: train on assistant turns only (messages data).
        max_length: sequences with more tokens are refused, or cut when truncate is set.
        truncate: cut over-long sequences on the right instead of refusing them; the count is logged.
    """

    teacher_model_name_or_path: str | None = None
    teacher_logprobs: str | None = None
    teacher_dtype: Literal["float32", "bfloat16"] | None = None
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float | None = None
    temperature: float = 1.0
    alpha: float = 0.0
    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    max_length: int | None = 1024
    truncate: bool = False


@dataclass(frozen=True, kw_only=True)
class GKDConfig(TrainConfig):
    """On-policy distillation (GKD): the student samples, the teacher says how likely each token was.

    Attributes:
        teacher_model_name_or_path: directory of the teacher, which must read the same tokens.
        teacher_dtype: precision of the teacher; None is that of the student.
        lmbda: share of rows whose completion the student samples itself.
        seq_kd: the teacher samples the completions of the other rows, in place of those in the data.
        beta: 0 is forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: divides the logits when sampling; the divergence is at temperature 1.
        max_new_tokens: most tokens of a sampled completion.
        rollout: how completions are sampled.
    """

    teacher_model_name_or_path: str
    teacher_dtype: Literal["float32", "bfloat16"] | None = None
    lmbda: float = 0.5
    seq_kd: bool = False
    beta: float = 0.5
    temperature: float = 0.9
    max_new_tokens: int = 128
    rollout: RolloutBlock = RolloutBlock()


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher's most likely tokens for fixed rows, stored for `fastrl distill --teacher_logprobs`.

    Attributes:
        model_name_or_path: directory of the teacher.
        train_dataset, eval_dataset: the files that will be distilled on.
        output_file: safetensors to write.
        top_k: tokens kept per position; all others are kept as one number.
        temperature: divides the teacher's logits; the student's must be the same.
        dtype: precision of the teacher.
        device: where to run; auto takes a GPU when there is one.
        attn_implementation: attention over packed sequences; auto is torch's varlen kernel on CUDA, else sdpa.
        trust_remote_code: run Python code that comes with the model.
        completion_only_loss, assistant_only_loss, max_length, truncate: which tokens count, as in `fastrl distill`.
        data: how rows become token sequences, as in `fastrl distill`.
        packing: how sequences are cut into batches.
    """

    model_name_or_path: str
    train_dataset: str
    eval_dataset: str | None = None
    output_file: str
    top_k: int = 64
    temperature: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "varlen", "flash"] = "auto"
    trust_remote_code: bool = False
    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    max_length: int | None = 1024
    truncate: bool = False
    data: DataBlock = DataBlock()
    packing: PackingBlock = PackingBlock()
