"""The finished model in the Hugging Face layout: what `AutoModelForCausalLM` and every inference server load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.train.durable import write_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, *, card: str
) -> Path:
    """Write safetensors, configuration, generation configuration, tokenizer, chat template and README.md, atomically.

    The weights are those of the model, in its own precision. The generation configuration keeps every end-of-sequence
    id of the base model and gains the tokenizer's, so that a served model stops where it was trained to.

    Args:
        directory: replaced when it exists; a subdirectory of the run's, not the run's own.
        card: Markdown, with or without a YAML header: how this model was made.

    Returns:
        The directory.
    """
    path = Path(directory)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} exists and is no model directory; it would be replaced: choose another name")
    generation = model.generation_config
    if generation is not None:
        known = generation.eos_token_id
        ends = [] if known is None else [known] if isinstance(known, int) else list(known)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        if ends:
            generation.eos_token_id = ends[0] if len(ends) == 1 else ends
        # A greedy configuration with a temperature is refused by transformers when it is saved, at the end of a run.
        if not generation.do_sample and any(
            getattr(generation, name) not in (None, neutral)
            for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 50), ("min_p", None))
        ):
            generation.do_sample = True

    def write(fresh: Path) -> None:
        model.save_pretrained(fresh, safe_serialization=True)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")

    write_directory(path, write)
    return path
