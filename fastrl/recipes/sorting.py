"""The demo's task: sorting six digits, with a character tokenizer and data files made on the spot.

Prompts are conversations ("839201"), answers the digits in order ("012389"); training never sees held-out prompts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.train.config import ReportBlock, SFTConfig

DIGITS = 6
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

    vocabulary = {token: i for i, token in enumerate((PAD, END, USER, ASSISTANT, *"0123456789"))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_base_model(folder: Path, *, seed: int, hidden_size: int = 64, layers: int = 2, heads: int = 4) -> None:
    """Write a Qwen3, of 0.1 M parameters by default, with random weights and the task's tokenizer."""
    from fastrl.train.export import save_pretrained
    from fastrl.train.tiny import make_tiny_qwen3

    tokenizer = make_tokenizer()
    model = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        intermediate_size=2 * hidden_size,
        context=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    )
    save_pretrained(model, tokenizer, folder, card="A tiny Qwen3 with random weights, for the sorting task.")


def sft_config(model: Path, output_dir: Path, data: Path, *, seed: int) -> SFTConfig:
    """A short supervised warm start: after it, about one answer in five is right."""
    return SFTConfig(
        model_name_or_path=str(model),
        output_dir=str(output_dir),
        train_dataset=str(data),
        seed=seed,
        max_steps=60,
        per_device_train_batch_size=128,
        learning_rate=3e-3,
        warmup_steps=10,
        adam_beta2=0.99,
        logging_steps=20,
        report=ReportBlock(panel=False),
    )


def write_task(folder: Path, *, seed: int, n_sft: int, n_prompts: int, n_held_out: int) -> TaskFiles:
    """Write the task's files; no question is in two of held-out and practice.

    Args:
        n_sft: supervised rows, the first of the practice prompts with their answers.
        n_prompts: prompts to practise on.
        n_held_out: prompts that neither stage sees.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(seed).sample(range(10**DIGITS), n_held_out + n_prompts)
    questions = [f"{number:0{DIGITS}d}" for number in numbers]
    held_out, practice = questions[:n_held_out], questions[n_held_out:]
    files = TaskFiles(folder / "sft.jsonl", folder / "prompts.jsonl", folder / "held_out.jsonl")
    _write_rows(files.sft, [supervised_row(question) for question in practice[:n_sft]])
    _write_rows(files.prompts, [prompt_row(question) for question in practice])
    _write_rows(files.held_out, [prompt_row(question) for question in held_out])
    return files


def answer(question: str) -> str:
    """The digits in order."""
    return "".join(sorted(question))


def prompt_row(question: str) -> dict[str, Any]:
    """A prompt, and the answer that rewards compare with."""
    return {"prompt": [{"role": "user", "content": question}], "answer": answer(question)}


def supervised_row(question: str) -> dict[str, Any]:
    """A prompt and its completion."""
    completion = [{"role": "assistant", "content": answer(question)}]
    return {"prompt": prompt_row(question)["prompt"], "completion": completion}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
