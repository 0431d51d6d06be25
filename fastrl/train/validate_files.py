"""Rules about paths in a configuration: what is read exists and has the right form, what is written can be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fastrl.train.config.pipeline import is_made_later
from fastrl.train.tiny_files import FILES, MODELS, is_tiny, tiny_problem


def model_problem(path: str) -> Iterator[str]:
    """A model is a directory with config.json and safetensors, or made on the spot or by an earlier stage."""
    if is_made_later(path):
        return
    if is_tiny(path):
        yield from tiny_problem("model_name_or_path", path, MODELS)
        return
    folder = Path(path)
    if not folder.is_dir():
        name = f"models/{folder.name}"
        download = f"; to download it: hf download {path} --local-dir {name}" if path.count("/") == 1 else ""
        yield f"model_name_or_path: {path} is not a directory{_tilde(path)}{download}"
    elif not (folder / "config.json").is_file():
        yield f"model_name_or_path: {path} has no config.json; expected a model in the Hugging Face layout"
    elif next(folder.glob("*.safetensors"), None) is None:
        yield f"model_name_or_path: {path} has no *.safetensors; pickled weights are not loaded"


def dataset_problem(key: str, path: str | None) -> Iterator[str]:
    """A data file exists, and its format can be read here."""
    if path is None:
        return
    if is_tiny(path):
        yield from tiny_problem(key, path, FILES)
        return
    yield from file_problem(key, path)
    if not path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        yield f"{key}: {path} is of an unknown type; expected a .jsonl, .jsonl.gz or .parquet file"
    if path.endswith(".parquet") and find_spec("pyarrow") is None:
        yield f"{key}: parquet needs the package pyarrow, which is not installed; pip install pyarrow"


def file_problem(key: str, path: str | None, *, is_directory: bool = False) -> Iterator[str]:
    """What is read exists. None is no path and no problem."""
    if path is None or is_made_later(path):
        return
    if not Path(path).exists():
        yield f"{key}: {path} does not exist{_tilde(path)}; paths start at the current directory"
    elif Path(path).is_dir() != is_directory:
        yield f"{key}: {path} is {'not a' if is_directory else 'a'} directory"


def writable_problem(key: str, path: str | None) -> Iterator[str]:
    """What is written can be made: the nearest folder above it that exists allows writing."""
    if path is None:
        return
    nearest = Path(path)
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if nearest.is_file() and key != "output_file":
        yield f"{key}: {nearest} is a file, so {path} cannot be a directory"
    elif not os.access(nearest, os.W_OK):
        yield f"{key}: {path} cannot be written: no permission in {nearest}"


def _tilde(path: str) -> str:
    return " ('~' is not expanded)" if path.startswith("~") else ""
