"""The finished model in the Hugging Face layout: what `AutoModelForCausalLM` and every inference server load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.train.distributed import is_first
from fastrl.train.durable import write_directory
from fastrl.train.lora import adapter_names
from fastrl.train.lora_files import merged_state, save_adapter, without_adapters
from fastrl.train.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, *, card: str
) -> Path:
    """Write safetensors, configuration, generation configuration, tokenizer, chat template and README.md, atomically.

    Of several ranks, which all hold the same weights, the first writes.

    The weights are those of the model, in its own precision. The generation configuration keeps every end-of-sequence
    id of the base model and gains the tokenizer's, so that a served model stops where it was trained to.

    A model with LoRA adapters is written with the active ones added to its weights (4-bit weights dequantised), so that
    it loads without peft; the adapter itself goes to `adapter` beside the directory, as peft writes it.

    Args:
        directory: replaced when it exists; a subdirectory of the run's, not the run's own.
        card: Markdown, with or without a YAML header: how this model was made.

    Returns:
        The directory.
    """
    path = Path(directory)
    if not is_first():
        return path
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} exists and is no model directory; it would be replaced: choose another name")

    def write(fresh: Path) -> None:
        plain, state = (without_adapters(model), merged_state(model)) if adapter_names(model) else (model, None)
        original = getattr(plain, "generation_config", None)  # theirs: a model that only scores has none
        if original is not None:
            plain.generation_config = _served(original, tokenizer.eos_token_id)
        try:
            with without_progress_bars():
                plain.save_pretrained(fresh, state_dict=state)
        finally:
            if original is not None:
                plain.generation_config = original
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")

    write_directory(path, write)
    if adapter_names(model):
        save_adapter(model, path.parent / "adapter")
    return path


def _served(generation: GenerationConfig, eos_token_id: int | None) -> GenerationConfig:
    """A copy of `generation` that also stops at `eos_token_id` and that transformers agrees to save."""
    served = copy.deepcopy(generation)
    known = served.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if eos_token_id is not None and eos_token_id not in ends:
        ends.append(eos_token_id)
    served.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    try:
        served.validate(strict=True)
    except ValueError:
        # Published models do sample with a temperature under do_sample=False; saving that fails at the end of a run.
        served.do_sample = True
    return served
