"""A teacher's most likely tokens for the trained positions of encoded rows, on disk.

    rows      [R, 32] uint8   SHA-256 of each row's token ids and mask: what a row is looked up by
    first     [R + 1] int64   entries of row r are first[r] .. first[r + 1], one for each trained token, in order
    ids       [M, K] int32    the k most likely tokens, most likely first
    logprob   [M, K] float32  their log-probabilities, nats
    tail      [M] float32     log-probability of all others together
    metadata: format, temperature, vocabulary (digest), provenance (JSON: fastrl, teacher, digests of what was read)

A row is found again by what was encoded, so order, repetition and choice of rows are free. The whole file is held in
memory: 12 K + 4 bytes per trained token when ids are looked up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastrl.ops import TopTokens
from fastrl.train.durable import sync
from fastrl.train.supervised import Example

FORMAT = "fastrl top tokens 1"
NAMES = ("rows", "first", "ids", "logprob", "tail")


def row_digest(example: Example) -> bytes:
    """SHA-256 of a row's token ids and of which of them are trained."""
    digest = hashlib.sha256(np.asarray(example.ids, np.int64).tobytes())
    digest.update(np.asarray(example.is_trained, np.bool_).tobytes())
    return digest.digest()


def write_top_tokens(
    path: Path,
    examples: Sequence[Example],
    parts: Sequence[TopTokens],
    *,
    temperature: float,
    vocabulary: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write the entries of each example, whole or not at all.

    Args:
        parts: of each example, one entry for each trained token.
    """
    counts = [len(part.tail) for part in parts]
    assert counts == [sum(example.is_trained) for example in examples]
    tensors = {
        "rows": torch.tensor([list(row_digest(example)) for example in examples], dtype=torch.uint8),
        "first": torch.tensor([0, *counts]).cumsum(0),
        "ids": torch.cat([part.ids for part in parts]).int(),
        "logprob": torch.cat([part.logprob for part in parts]).float(),
        "tail": torch.cat([part.tail for part in parts]).float(),
    }
    metadata = {
        "format": FORMAT,
        "temperature": repr(temperature),
        "vocabulary": vocabulary,
        "provenance": json.dumps(provenance, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    save_file(tensors, fresh, metadata=metadata)
    sync(fresh)
    fresh.rename(path)
    sync(path.parent)


@dataclass(frozen=True, slots=True)
class StoredTeacher:
    """What a file holds.

    Attributes:
        path: of the file, for messages.
        place: digest of a row -> its number in the file.
        first: [R + 1] where each row's entries begin.
        tokens: all M entries, on the CPU.
    """

    path: str
    place: Mapping[bytes, int]
    first: Tensor
    tokens: TopTokens

    def of(self, examples: Sequence[Example]) -> TopTokens:
        """The entries of some rows, one row after the other."""
        spans = [self._span(example) for example in examples]
        index = torch.cat([torch.arange(first, last) for first, last in spans])
        ids, logprob, tail = (x[index] for x in self.tokens)
        return TopTokens(ids.long(), logprob, tail)

    def check(self, examples: Sequence[Example], *, source: str) -> None:
        """Refuse rows that the file does not have.

        Raises:
            ValueError: the first of them, by its number among the rows of `source` that are not refused.
        """
        for number, example in enumerate(examples, 1):
            if row_digest(example) not in self.place:
                raise ValueError(
                    f"teacher_logprobs: {self.path} has nothing for row {number} of {source}; write it again with "
                    "fastrl teacher from the same file, templates, tokenizer and loss masks"
                )

    def _span(self, example: Example) -> tuple[int, int]:
        row = self.place[row_digest(example)]
        return int(self.first[row]), int(self.first[row + 1])


def read_top_tokens(path: str, *, temperature: float, vocabulary: str) -> StoredTeacher:
    """Read a file that fits the run.

    Args:
        temperature: of the run; stored log-probabilities cannot be brought to another one.
        vocabulary: digest of the student's.

    Raises:
        ValueError: a file of another kind, temperature or vocabulary.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or set(file.keys()) != set(NAMES):
                raise ValueError(f"teacher_logprobs: {path} was not written by fastrl teacher")
            rows, first, *tokens = (file.get_tensor(name) for name in NAMES)
    except SafetensorError as error:
        raise ValueError(f"teacher_logprobs: {path} is damaged ({error}); write it again") from error
    if float(metadata["temperature"]) != temperature:
        raise ValueError(
            f"teacher_logprobs: {path} was written at temperature {metadata['temperature']}, and temperature is "
            f"{temperature}; set that, or write it again"
        )
    if metadata["vocabulary"] != vocabulary:
        raise ValueError(
            f"teacher_logprobs: {path} is of a teacher with another vocabulary than the student's; "
            "a teacher must have the student's vocabulary: choose one of the same family"
        )
    place = {bytes(row.tolist()): number for number, row in enumerate(rows)}
    return StoredTeacher(path, place, first, TopTokens(*tokens))
