"""What a Hugging Face model directory must hold before any weight of it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def model_directory(path: str | Path, *, trust_remote_code: bool) -> Path:
    """`path` as a directory whose configuration this transformers can build, or one sentence about what is wrong."""
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(
            f"model directory {directory} does not exist; fastrl reads local directories only, "
            "so download the model first (huggingface-cli download NAME --local-dir DIRECTORY)"
        )
    config = json_file(directory / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if not trust_remote_code and (directory / name).is_file() and "auto_map" in json_file(directory / name):
            raise ValueError(
                f"{directory / name} has an auto_map, which runs Python code shipped with the model; "
                "read that code, then pass --trust_remote_code true"
            )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not trust_remote_code and config.get("model_type") not in known:
        raise ValueError(
            f"{directory / 'config.json'} has model_type {config.get('model_type')!r}, "
            "which is no causal language model this version of transformers knows; upgrade transformers"
        )
    return directory


def json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a model directory needs one, as save_pretrained writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def context_length(path: str | Path) -> int | None:
    """Most tokens that the model of a directory takes, as its configuration says; None when it does not."""
    config = json_file(Path(path) / "config.json")
    for source in (config, config.get("text_config", {})):
        for name in ("max_position_embeddings", "n_positions"):
            if name in source:
                return int(source[name])
    return None


def check_weight_files(directory: Path) -> None:
    """Refuse a directory without safetensors, or with a damaged one; no tensor is read."""
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{directory} has no *.safetensors file, and pickled weights are never read; convert them with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) on a machine you can lose"
        )
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); copy or download it again") from error
