"""Digests of the files a run depends on, so that a resumed run is not continued on other data, weights or rewards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

WHOLE = 64 * 2**20  # files up to this size are read whole
BLOCK = 64 * 2**10
BLOCKS = 256


def contents_of(*, data: Iterable[str | None], model: str, rewards: Iterable[str] = ()) -> Mapping[str, str]:
    """Return file -> digest for data files, the model's configuration and weights, and reward files.

    Args:
        data: paths; None is left out.
        model: directory of the starting model.
        rewards: specs as in the configuration; files and model directories they name count: `path.py:function`,
            `judge(config='judge.yaml')`, `reward_model(path='runs/reward/model')`.

    Cost: one pass over files up to 64 MiB; larger ones are sampled (size and 256 blocks of 64 KiB, first and last
        among them), which any retraining of a model changes.
    """
    paths = [Path(path) for path in data if path is not None]
    paths += _files(Path(model))
    for spec in rewards:
        name = spec.removeprefix("verl:").partition(":")[0]
        if name.endswith(".py"):
            paths.append(Path(name))
        for option in quoted(spec):
            paths += _files(Path(option)) if Path(option).is_dir() else [Path(option)]
    return {str(path): digest(path) for path in paths if path.is_file()}


QUOTED = re.compile(r"""(?<==)\s*(['"])(.+?)\1""")


def quoted(spec: str) -> list[str]:
    """The texts among the options of a reward's spec, some of which are paths."""
    return [text for _, text in QUOTED.findall(spec)]


def _files(folder: Path) -> list[Path]:
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of its size and evenly spaced blocks when it is larger than 64 MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            file.seek((size - BLOCK) * block // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()
