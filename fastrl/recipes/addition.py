"""The demo's task: adding two-digit numbers, with a character tokenizer and data files made on the spot.

Prompts are conversations ("37+58") and answers three digits ("095"); held-out prompts never appear in training.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+"
USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """Where the rows are: supervised pairs, prompts to practise on, prompts held out from both."""

    sft: Path
    prompts: Path
    held_out: Path


def make_tokenizer() -> Any:
    """Build a character-level tokenizer with a chat template; every digit is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, END, USER, ASSISTANT, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, extra_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_task(folder: Path, *, seed: int, n_sft: int, n_held_out: int) -> TaskFiles:
    """Write the task's files; every pair of numbers 0 .. 99 is in exactly one of held-out and the rest.

    Args:
        n_sft: supervised rows, drawn from the prompts that are not held out.
        n_held_out: prompts that neither stage sees.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(pairs)
    held_out, practice = pairs[:n_held_out], pairs[n_held_out:]
    files = TaskFiles(folder / "sft.jsonl", folder / "prompts.jsonl", folder / "held_out.jsonl")
    _write_rows(files.sft, [_supervised(a, b) for a, b in practice[:n_sft]])
    _write_rows(files.prompts, [_question(a, b) for a, b in practice])
    _write_rows(files.held_out, [_question(a, b) for a, b in held_out])
    return files


def _answer(a: int, b: int) -> str:
    return f"{a + b:03d}"


def _question(a: int, b: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{a:02d}+{b:02d}"}], "answer": _answer(a, b)}


def _supervised(a: int, b: int) -> dict[str, Any]:
    completion = [{"role": "assistant", "content": _answer(a, b)}]
    return {"prompt": _question(a, b)["prompt"], "completion": completion}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
