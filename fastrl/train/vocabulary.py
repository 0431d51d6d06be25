"""Whether the models of a run read the same tokens: a second model with others would score another text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.train.config import InferenceConfig, TrainConfig
from fastrl.train.model import load_tokenizer
from fastrl.train.model_directory import has_tokenizer, json_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_same_vocabulary(
    config: TrainConfig | InferenceConfig, tokenizer: PreTrainedTokenizerBase, other: str | None, *, option: str
) -> None:
    """Refuse a reference, teacher, critic or reward model with other tokens than the policy, before weights are read.

    Args:
        tokenizer: the policy's.
        other: the directory; None is the policy's own and always fits.
        option: what names it, for the message.

    Raises:
        ValueError: naming the first token with another number there; without a tokenizer there (an adapter has none),
            when a configuration there announces a vocabulary of another size.
    """
    if other is None:
        return
    folder = Path(other)
    remedy = "all models of a run must read the same tokens: choose one of the same family"
    if not has_tokenizer(folder):
        ours = _vocab_size(json_file(Path(config.model_name_or_path) / "config.json"))
        theirs = _vocab_size(json_file(folder / "config.json")) if (folder / "config.json").is_file() else ours
        if ours != theirs:
            raise ValueError(
                f"{option}: the vocabulary of {other} has {theirs} tokens and that of "
                f"{config.model_name_or_path} has {ours}; {remedy}"
            )
        return
    own = tokenizer.get_vocab()
    found = load_tokenizer(other, chat_template=None, trust_remote_code=config.trust_remote_code).get_vocab()
    different = [token for token in own.keys() | found.keys() if own.get(token) != found.get(token)]
    if different:
        first = min(different, key=lambda token: (own.get(token, found.get(token, 0)), token))
        raise ValueError(
            f"{option}: {other} has another vocabulary than {config.model_name_or_path} ({len(found)} tokens and "
            f"{len(own)}): {first!r} is {found.get(first, 'absent')} there and {own.get(first, 'absent')} here; "
            f"{remedy}"
        )


def _vocab_size(content: Mapping[str, object]) -> object:
    text = content.get("text_config")
    return content.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
