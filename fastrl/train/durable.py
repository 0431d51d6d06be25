"""Files and directories that are there completely, or not at all, after a crash or a power cut.

The rule: write under a temporary name, fsync each file and its directory, rename, fsync the parent. Without the fsyncs
a rename can outlive the data it points to; without the rename a killed run leaves half a directory under a good name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Make `path` hold exactly what `write` puts into the empty directory it is given.

    An existing `path` is replaced, and is whole until the new one is complete; between the two renames of a replacement
    a crash leaves it under `.NAME.old`. When `write` raises (a full disk), `path` is untouched and nothing is left.
    """
    fresh = path.with_name(f".{path.name}.tmp")
    previous = path.with_name(f".{path.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
        sync_tree(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    fresh.rename(path)
    sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Make `path` hold `text`, or what it held before."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    fresh.rename(path)
    sync(path.parent)


def remove_directory(path: Path) -> None:
    """Delete `path` so that no half of it is ever seen under its name."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    sync(path.parent)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """`sync` every file below `directory`, then every directory, the deepest first."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
