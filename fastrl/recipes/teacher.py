"""A teacher's most likely tokens for rows of data: what `fastrl distill` learns from when no teacher is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastrl import __version__
from fastrl.data.pack import pack, unpack
from fastrl.ops import TopTokens, linear_top_tokens
from fastrl.train.config import TeacherConfig
from fastrl.train.contents import contents_of
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.model import hidden_states, load_model, load_tokenizer, model_head
from fastrl.train.sequences import supervised_sequence
from fastrl.train.supervised import Example, load_examples
from fastrl.train.teacher import vocabulary_digest
from fastrl.train.top_tokens_file import write_top_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCK = 1024  # rows packed at once: the batches of a whole data set would fill the device


def run(config: TeacherConfig) -> int:
    """Write `output_file`; return the process's exit code."""
    path = Path(config.output_file)
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or choose another --output_file")
    device = pick_device(config.device)
    tokenizer = load_tokenizer(
        config.model_name_or_path, chat_template=config.data.chat_template, trust_remote_code=config.trust_remote_code
    )
    size = max(tokenizer.get_vocab().values()) + 1
    if config.top_k > size:
        raise ValueError(f"top_k: {config.top_k} is more than the {size} tokens there are; lower it")
    sources = [source for source in (config.train_dataset, config.eval_dataset) if source is not None]
    found = [load_examples(source, tokenizer, config, output_dir=None).rows for source in sources]
    examples = list(dict.fromkeys(example for rows in found for example in rows))
    model = load_model(
        config.model_name_or_path,
        dtype=compute_dtype(config.dtype),
        device=device,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    parts: list[TopTokens] = []
    for start in range(0, len(examples), BLOCK):
        parts += _scored(config, model, tokenizer, examples[start : start + BLOCK])
    contents = contents_of(data=[*sources, config.data.chat_template], model=config.model_name_or_path)
    provenance = {"fastrl": __version__, "config": asdict(config), "contents": contents}
    write_top_tokens(
        path,
        examples,
        parts,
        temperature=config.temperature,
        vocabulary=vocabulary_digest(tokenizer),
        provenance=provenance,
    )
    n_tokens = sum(len(part.tail) for part in parts)
    tail = torch.cat([part.tail for part in parts]).exp().mean()
    print(f"{path}: {len(examples)} rows, {n_tokens} tokens, top {config.top_k}; mean probability left out {tail:.2g}")
    return 0


@torch.no_grad()
def _scored(
    config: TeacherConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[TopTokens]:
    """One TopTokens per example, on the CPU, with an entry for each trained token."""
    head = model_head(model, temperature=config.temperature)
    size = max(tokenizer.get_vocab().values()) + 1
    sequences = [supervised_sequence(example.ids, example.is_trained, weight=1.0) for example in examples]
    parts: dict[int, TopTokens] = {}
    for batch in pack(sequences, token_budget=config.packing.token_budget, device=model.device):
        rows = batch.weight.nonzero()[:, 0]
        found = linear_top_tokens(
            hidden_states(model, batch)[rows],
            head.weight,
            config.top_k,
            bias=head.bias,
            temperature=head.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            valid_vocab=size,
        )
        counts = [int((weight != 0).sum()) for weight in unpack(batch.weight, batch)]
        pieces = zip(*(x.cpu().split(counts) for x in found), strict=True)
        for index, (ids, logprob, tail) in zip(batch.sequence.tolist(), pieces, strict=True):
            parts[index] = TopTokens(ids, logprob, tail)
    return [parts[index] for index in range(len(examples))]
