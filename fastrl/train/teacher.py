"""A frozen teacher beside the student: the same tokens, no gradient, and a loss for each way to know what it thinks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.ops import TopTokens, linear_divergence, linear_topk_divergence
from fastrl.ops.divergence_pass import DivergenceLoss
from fastrl.train.config import DistillConfig, GKDConfig, KernelsBlock
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.model import hidden_states, load_model, model_head
from fastrl.train.update import BatchLoss
from fastrl.types import LossOutput, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def teacher_of(config: DistillConfig | GKDConfig, path: str) -> PreTrainedModel:
    """Read the teacher at `path`, frozen, on the student's device."""
    model = load_model(
        path,
        dtype=compute_dtype(config.teacher_dtype or config.dtype),
        device=pick_device(config.device),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    return model.requires_grad_(False)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the map from tokens to ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def live_teacher_loss(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    kernels: KernelsBlock,
    *,
    beta: float,
    temperature: float = 1.0,
    alpha: float = 0.0,
) -> BatchLoss:
    """Divergence from a teacher that reads every batch too, as `update` calls it.

    Cost: the teacher's forward pass and 2 N E V + 6 N D V operations over the heads of N trained positions.
    """
    valid_vocab = shared_vocabulary(model, teacher)

    def loss(batch: TokenBatch) -> LossOutput:
        head, of_teacher = model_head(model), model_head(teacher)
        with torch.no_grad():
            teacher_hidden = hidden_states(teacher, batch)
        result = linear_divergence(
            hidden_states(model, batch),
            head.weight,
            teacher_hidden,
            of_teacher.weight,
            beta=beta,
            target=batch.target,
            alpha=alpha,
            bias=head.bias,
            teacher_bias=of_teacher.bias,
            temperature=temperature,
            softcap=head.softcap,
            teacher_softcap=of_teacher.softcap,
            logit_scale=head.logit_scale,
            teacher_logit_scale=of_teacher.logit_scale,
            valid_vocab=valid_vocab,
            row_weight=batch.weight,
            chunk_rows=kernels.chunk_rows,
            backend=kernels.backend,
        )
        return LossOutput(result.loss, metrics_of(result))

    return loss


def stored_teacher_loss(
    model: PreTrainedModel,
    kernels: KernelsBlock,
    stored: Callable[[TokenBatch], TopTokens],
    *,
    beta: float,
    temperature: float,
    alpha: float,
) -> BatchLoss:
    """Divergence from what was stored of a teacher, as `update` calls it.

    Args:
        stored: batch -> TopTokens of its M trained positions, in their order.
    """

    def loss(batch: TokenBatch) -> LossOutput:
        head = model_head(model)
        rows = batch.weight.nonzero()[:, 0]
        result = linear_topk_divergence(
            hidden_states(model, batch)[rows],
            head.weight,
            stored(batch),
            beta=beta,
            target=batch.target[rows],
            alpha=alpha,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            row_weight=batch.weight[rows],
            chunk_rows=kernels.chunk_rows,
            backend=kernels.backend,
        )
        nothing = torch.zeros_like(batch.weight)
        metrics = {name: nothing.index_copy(0, rows, value.float()) for name, value in metrics_of(result).items()}
        return LossOutput(result.loss, metrics)

    return loss


def metrics_of(result: DivergenceLoss) -> dict[str, Tensor]:
    """Per-token numbers to log: the divergence, and entropy and log-probability of the label under the student."""
    assert result.stats is not None, "both losses above pass the batch's targets"
    return {"divergence": result.divergence, "entropy": result.stats.entropy, "logps": result.stats.logprob}


def shared_vocabulary(model: PreTrainedModel, teacher: PreTrainedModel) -> int | None:
    """Rows that both heads have; None when that is all. Families pad their heads to different lengths."""
    ours, theirs = (len(model_head(each).weight) for each in (model, teacher))
    return None if ours == theirs else min(ours, theirs)
