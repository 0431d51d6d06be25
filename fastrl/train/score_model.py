"""A language model whose head is one row: a score for every prefix (reward model, process reward model, critic).

    score[t] = score.weight [1, D] @ hidden[t]        hidden[t] has seen input_ids[..t] of its sequence

The layout on disk is that of transformers' `AutoModelForSequenceClassification` with `num_labels=1`, which reads the
score at the last token that is no padding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from fastrl.data.pack import TokenSequence
from fastrl.train.attention import Implementation
from fastrl.train.export import save_pretrained
from fastrl.train.model import check_packed_hidden, check_vocabulary, check_weights, hidden_states, make_packed
from fastrl.train.model_directory import check_weight_files, json_file, model_directory
from fastrl.train.native_layers import LayerKernels
from fastrl.train.progress_bars import without_load_report
from fastrl.train.quantize import four_bit, keep_differentiable
from fastrl.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD = "score.weight"


def load_score_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: Implementation = "auto",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    layers: LayerKernels = "transformers",
    new_head: float | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Read a backbone with a scalar head; checked, probed and made ready for packed batches as `load_model` does.

    Args:
        path: a reward model's directory; with `new_head` also that of a causal language model, whose own head is
            left behind.
        new_head: None takes the head of the directory. A number makes a fresh one, normal with deviation
            new_head / sqrt(D + 1): 1 gives scores of variance about 1, 0 gives the score 0 for every text (a critic
            that starts from no opinion; the backbone then learns from the second step on).
        seed: of the fresh head; nothing else is random.

    Returns:
        The model in eval mode. Its head stays in float32, whatever `dtype` is: differences of scores are small.

    Raises:
        ValueError: as `load_model`; no head in the directory and no `new_head`; a head of several rows or with a bias.
        RuntimeError: the attention or the layers asked for cannot run on this machine.

    Source: Stiennon 2020, arXiv:2009.01325, app. B.1 (deviation 1 / sqrt(D + 1)).
    """
    directory = model_directory(path, trust_remote_code=trust_remote_code)
    check_weight_files(directory)
    check_vocabulary(directory, trust_remote_code=trust_remote_code)
    _check_family(directory, trust_remote_code=trust_remote_code)
    if new_head is None and not has_score_head(directory):
        raise ValueError(
            f"{_weight_index(directory)} has no weight {HEAD!r}, so {directory} is no reward model; train one with "
            "fastrl reward, and name its model directory"
        )
    with without_load_report():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(directory),
            num_labels=1,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **(four_bit(dtype, device) if load_in_4bit else {}),
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
        )
    head = getattr(model, "score", None)  # theirs: families of other shapes call it `classifier`, or give it layers
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{type(model).__name__} has no linear head `score` without bias; use a decoder-only family")
    head.to(torch.promote_types(dtype, torch.float32))
    keep_differentiable(model)
    if new_head is not None:
        deviation = new_head / (head.in_features + 1) ** 0.5
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(0.0, deviation, generator=generator)
        report = {problem: [name for name in names if HEAD not in name] for problem, names in report.items()}
    check_weights(model, report, directory)
    make_packed(
        model,
        device=device,
        attn_implementation=attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        layers=layers,
    )
    check_packed_hidden(model)
    return model  # type: ignore[no-any-return]


def has_score_head(path: str | Path) -> bool:
    """Whether the safetensors files of a model directory hold a scalar head.

    Raises:
        ValueError: no model directory, or damaged files.
    """
    directory = model_directory(path, trust_remote_code=True)  # nothing of it runs here
    check_weight_files(directory)
    index = _weight_index(directory)
    if index.suffix == ".json":
        return HEAD in json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    with safe_open(index, framework="pt") as file:
        return HEAD in file.keys()  # noqa: SIM118 (a handle, not a mapping)


def save_score_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, *, card: str
) -> Path:
    """Write a directory from which `AutoModelForSequenceClassification` gives the same reward; see `save_pretrained`.

    It reads the score at the last token that is not `pad_token_id`. A tokenizer without a padding token, or that pads
    with its end of sequence, would move that place, so no `pad_token_id` is written then: texts scored one by one are
    read at their last token, and transformers refuses batches.
    """
    pads = tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id if pads else None
    return save_pretrained(model, tokenizer, directory, card=card)


def token_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The score of the prefix that ends at each fed position.

    Returns:
        [T] f32 (f64 of a model in f64), in units of reward; index t has seen input_ids[..t] of its own sequence, and
        target[t] not. Differentiable unless gradients are off.
    """
    scores: Tensor = model.score(hidden_states(model, batch).to(model.score.weight.dtype))
    return scores[:, 0]


def scored_sequence(ids: Sequence[int], weight: Sequence[float]) -> TokenSequence:
    """Lay ids out so that a score can be read at every one of them, the last included.

    `pack` never feeds the last id of a sequence, so one more is appended, which no score sees.

    Args:
        ids: [n] token ids.
        weight: [n] share of the optimizer step's loss that reads the score of the prefix ending at ids[i]; 0 where
            none is read. In the packed batch it is `weight[t]` of the position that feeds ids[i].
    """
    return TokenSequence(
        ids=np.array([*ids, ids[-1]], dtype=np.int64), weight=np.array([0.0, *weight], dtype=np.float32)
    )


def last_scores(scores: Tensor, batch: TokenBatch) -> Tensor:
    """[T] scores -> [S] score at the last fed position of each sequence, in the order of `batch.sequence`."""
    return scores[batch.cu_seqlens[1:].long() - 1]


def _weight_index(directory: Path) -> Path:
    """The file that says which weights a directory has."""
    index = directory / "model.safetensors.index.json"
    return index if index.is_file() else min(directory.glob("*.safetensors"))


def _check_family(directory: Path, *, trust_remote_code: bool) -> None:
    family = json_file(directory / "config.json").get("model_type")
    if not trust_remote_code and family not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"{directory / 'config.json'} has model_type {family!r}, of which transformers has no sequence classifier; "
            "use a model of another family (Llama, Qwen, Gemma, Mistral, GPT-2, ...)"
        )
