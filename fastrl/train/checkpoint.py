"""Checkpoints a killed run can trust: `checkpoint-N/` exists only when whole, and proves it before it is used.

    checkpoint-N/NAME.safetensors    one file per group of tensors
    checkpoint-N/state.json          everything else
    checkpoint-N/manifest.json       {"files": {name: {"bytes", "sha256"}}, "format": 1, "step": N}

A flipped bit loads without an error in every tensor format, so our own hashes decide. Nothing is pickled. A step's name
is never used twice: a reader cannot meet half of an old checkpoint under a new one's name.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrl.train.durable import remove_directory, sync, write_directory

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or none of a run's is whole."""


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write `checkpoint-STEP/` and wait until it is on the disk; a crash at any moment leaves all of it or none.

    Args:
        run_dir: directory of the run.
        step: optimizer steps taken.
        tensors: group -> name -> tensor, one file per group; groups are file names, such as "optimizer".
        state: JSON values with string keys; tuples come back as lists.
        keep: most checkpoints left afterwards, the newest ones; None keeps all.

    Returns:
        The new directory.

    Raises:
        FileExistsError: the run has this checkpoint already.
        OSError: the disk is full or broken; every earlier checkpoint is as it was.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    path = Path(run_dir) / f"checkpoint-{step}"
    if path.exists():
        raise FileExistsError(
            f"{path} exists, and a step's name is never reused; move it away or use another output_dir"
        )

    def write(directory: Path) -> None:
        for group, named in tensors.items():
            save_file({name: t.detach().contiguous() for name, t in named.items()}, directory / f"{group}.safetensors")
        text = json.dumps(state, sort_keys=True, indent=1)
        (directory / "state.json").write_text(text, encoding="utf-8")
        (directory / "manifest.json").write_bytes(_manifest(directory, step))

    write_directory(path, write)
    if keep is not None:
        for _, old in _checkpoints(Path(run_dir))[keep:]:
            remove_directory(old)
    return path


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Verify a checkpoint and read it back: the `tensors` and the `state` it was saved with, on the CPU.

    Raises:
        CheckpointError: it is not whole; the message names the file.
    """
    directory = Path(path)
    verify_checkpoint(directory)
    tensors = {file.stem: load_file(file) for file in sorted(directory.glob("*.safetensors"))}
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return tensors, state


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose manifest verifies; None when the run has saved none yet.

    Damaged ones that are newer are renamed to `checkpoint-N.corrupt`, each with a warning.

    Raises:
        CheckpointError: there are checkpoints, and none is whole: starting afresh would hide the loss.
    """
    directory = Path(run_dir)
    for _, path in _checkpoints(directory):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            _set_aside(path)
            warnings.warn(f"{error}; renamed to {path.name}.corrupt, trying the one before", stacklevel=2)
            continue
        return path
    damaged = sorted(path.name for path in directory.glob("checkpoint-*.corrupt*"))
    if damaged:
        raise CheckpointError(
            f"{directory} has checkpoints, but none is whole ({', '.join(damaged)}); "
            "start again in another output_dir, or delete them to start again here"
        )
    return None


def set_aside_from(run_dir: str | Path, step: int) -> bool:
    """Rename the checkpoints of `step` and later to `checkpoint-N.rolled-back`, the newest first.

    Returns:
        Whether an earlier checkpoint is left; without one, nothing is renamed.
    """
    found = _checkpoints(Path(run_dir))
    if not any(number < step for number, _ in found):
        return False
    for number, path in found:
        if number >= step:
            _set_aside(path, "rolled-back")
    return True


def resume_point(run_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint `--resume` means: "auto" is the newest whole one if any, else a path; None starts afresh.

    Only the process that owns the run directory may call this: it sweeps up what a killed save left behind.

    Raises:
        ValueError: the path is no directory, or the run went on after it: its later names could not be used again.
        CheckpointError: the checkpoint is damaged.
    """
    for leftover in [*Path(run_dir).glob(".checkpoint-*.tmp"), *Path(run_dir).glob(".checkpoint-*.old")]:
        shutil.rmtree(leftover)
    if resume is None:
        return None
    if resume == "auto":
        return newest_checkpoint(run_dir)
    chosen = Path(resume)
    match = _NAME.fullmatch(chosen.name)
    if match is None or not chosen.is_dir():
        raise ValueError(f"resume must be 'auto' or an existing checkpoint-N directory, got {resume!r}")
    later = [p.name for step, p in _checkpoints(Path(run_dir)) if step > int(match[1])]
    if later:
        raise ValueError(
            f"{run_dir} went on after {chosen.name} ({', '.join(later)}); move those away, or use another output_dir"
        )
    verify_checkpoint(chosen)
    return chosen


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest, by name, size and hash.

    Raises:
        CheckpointError: naming the file that is missing, left over or different.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise CheckpointError(f"{path} has no manifest.json")
    content = manifest_path.read_bytes()
    try:
        manifest = json.loads(content)
        files: dict[str, dict[str, Any]] = manifest["files"]
        # Only the exact bytes we would write are accepted, so that no flipped bit of the manifest itself is harmless.
        is_canonical = content == _canonical(manifest) and set(manifest) == {"files", "format", "step"}
        is_ours = manifest["format"] == FORMAT and f"checkpoint-{manifest['step']}" == path.name
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path} is damaged: {error}") from error
    if not (is_canonical and is_ours):
        raise CheckpointError(f"{manifest_path} is damaged, or belongs to another step or format")
    present = {file.name for file in path.iterdir()} - {"manifest.json"}
    for name in sorted(present ^ set(expected)):
        raise CheckpointError(
            f"{path / name} is {'not in manifest.json' if name in present else 'in manifest.json and missing'}"
        )
    for name, (size, digest) in sorted(expected.items()):
        file = path / name
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged: {file.stat().st_size} bytes, and manifest.json says {size}")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} is damaged: its hash is not that of manifest.json")


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything named checkpoint-N, the newest first; the step decides, not the file times."""
    if not run_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in run_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _set_aside(path: Path, reason: str = "corrupt") -> None:
    target = path.with_name(f"{path.name}.{reason}")
    number = 2
    while target.exists():
        target = path.with_name(f"{path.name}.{reason}{number}")
        number += 1
    path.rename(target)
    sync(path.parent)


def _manifest(directory: Path, step: int) -> bytes:
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(directory.iterdir())}
    return _canonical({"files": files, "format": FORMAT, "step": step})


def _canonical(manifest: Any) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
