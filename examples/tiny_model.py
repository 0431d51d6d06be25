"""Make a model to practise on: random weights, and a byte-level BPE tokenizer trained on a file of rows.

python examples/tiny_model.py runs/gsm8k/train.jsonl runs/gsm8k/base
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastrl.data.readers import read_rows
from fastrl.train.export import save_pretrained
from fastrl.train.tiny import make_tiny_qwen3

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with a chat template.

    Any text can be encoded, as the 256 bytes are tokens. Every digit is a token of its own, so that a number is
    always cut the same way. Control tokens stand between the turns: no merge crosses from prompt to completion.

    Args:
        vocab_size: most tokens of the vocabulary, the four control tokens included; a short text gives fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, extra_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def texts_of(content: str | Sequence[dict[str, Any]]) -> list[str]:
    """A text, or the texts of a list of messages."""
    return [content] if isinstance(content, str) else [message["content"] for message in content]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model directory and say how large the model is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", help="JSONL with `prompt` and, where there is one, `completion`")
    parser.add_argument("model_dir", help="where the model goes")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    rows = read_rows(options.rows)
    tokenizer = make_tokenizer(
        (text for row in rows for name in ("prompt", "completion") for text in texts_of(row.get(name) or "")),
        vocab_size=options.vocab_size,
    )
    model = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=options.hidden_size,
        layers=options.layers,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=options.seed,
    )
    save_pretrained(model, tokenizer, Path(options.model_dir), card="A tiny Qwen3 with random weights.\n")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.model_dir}: {n_parameters:,} parameters with random weights, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
