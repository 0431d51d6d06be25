"""A tokenizer in which a random model calls tools by chance: a call is one token."""

from __future__ import annotations

import json
from pathlib import Path

from fastrl.train.export import save_pretrained
from fastrl.train.tiny import make_tiny_qwen3

PAD, END, USER, ASSISTANT, TOOL = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>"
BROKEN = "<tool_call>{</tool_call>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name":"{{ c.function.name }}"}</tool_call>{% endfor %}<|end|>'
    "{% elif m.role == 'tool' %}<|tool|>{{ m.content }}{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_agent_base(folder: Path, *, call: str = "press") -> tuple[Path, Path]:
    """A random model whose vocabulary has digits and two whole calls, all else is padding; and a file of prompts."""
    whole = f'<tool_call>{{"name":"{call}"}}</tool_call>'
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = (PAD, END, USER, ASSISTANT, TOOL)
    vocabulary = {token: i for i, token in enumerate((*specials, whole, BROKEN, *"0123456789"))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in (whole, BROKEN)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, extra_special_tokens=[USER, ASSISTANT, TOOL]
    )
    tokenizer.chat_template = TEMPLATE
    model = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=16,
        layers=2,
        intermediate_size=32,
        context=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_pretrained(model, tokenizer, folder / "model", card="random")
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "start": n} for n in range(3)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "model", folder / "prompts.jsonl"
