"""One run, one directory: a lock while it is open, the configuration it was started with, no accidental reuse.

output_dir/run.json     the configuration
output_dir/owner.json   who holds the lock; the lock itself is the kernel's and ends with the process

Of several ranks the first alone holds the lock and writes; what a run decides (a signal to stop) they decide together.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from fastrl.train.distributed import any_of, from_first, gather, is_first, rank, size
from fastrl.train.durable import write_text
from fastrl.train.interrupt import Interrupt

CONFIG_FILE = "run.json"  # not config.json, which is the model's name for its own
OWNER_FILE = "owner.json"
BEFORE_START = (OWNER_FILE, CONFIG_FILE, "rejected.jsonl", "environment.json")

# Fields, and blocks of fields, that change what a run costs or shows but not what it computes.
NOT_SEMANTIC = (
    "output_dir",
    "resume_from_checkpoint",
    "report",
    "packing",
    "kernels",
    "rewards",
    "rollout.batch_size",
    "rollout.server",
    "rollout.vllm.gpu_memory_utilization",
    "rollout.vllm.kv_cache_gib",
    "rollout.vllm.enforce_eager",
    "rollout.vllm.sleep",
    "rollout.vllm.probe_tolerance",
    "rollout.timeout_seconds",
    "environment.workers",
    "distributed",
    "signals",  # a run that a signal stopped goes on with other limits; what a signal does is in signals.jsonl
    "gradient_checkpointing",
    "attn_implementation",
    "trust_remote_code",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_dataset",
    "eval_steps",
    "on_nonfinite",
)

BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps", "ranks")


class RunDirectoryError(ValueError):
    """The directory is another run's, or this run may not go on in it."""


class RunDirectory:
    """Owner of a run's directory: holds its lock and listens for signals until `close` or the end of its `with`.

    Args:
        lock: None on ranks that do not hold it.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock
        self._interrupt = Interrupt()
        self._interrupt.__enter__()

    def interrupted(self) -> bool:
        """Whether SIGTERM or Ctrl-C has asked the run to save and exit with `EXIT_INTERRUPTED`.

        All ranks must ask, and get the same answer: yes when any of them was asked to stop.
        """
        return any_of(self._interrupt.requested(), "the word on whether to stop")

    def close(self) -> None:
        """Give the lock back and restore the signal handlers; a second call does nothing."""
        self._interrupt.__exit__(None, None, None)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_run_directory(output_dir: str | Path, config: Mapping[str, Any], *, resume: str | None) -> RunDirectory:
    """Take `output_dir` for this process, or for all ranks at once, and record what runs there.

    Args:
        config: the run's configuration as nested JSON values (`dataclasses.asdict`); the number of ranks is added.
        resume: None for a new run; "auto" or a checkpoint to go on with one.

    Raises:
        RunDirectoryError: another process runs there; it is used and `resume` is None; or the run to resume
            differs in a field that changes the result (the differences are listed), or the configurations of the ranks.
    """
    record = {**config, "ranks": size()}
    _check_same_everywhere(record)
    path = Path(output_dir)
    lock = from_first(lambda: _taken(path, record, resume=resume), "the run directory")
    return RunDirectory(path, lock if is_first() else None)


def _taken(path: Path, config: Mapping[str, Any], *, resume: str | None) -> int:
    """Descriptor of the lock of a run directory that may be used."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"output_dir {path} is a file; choose another --output_dir")
    path.mkdir(parents=True, exist_ok=True)
    lock = _locked(path)
    try:
        # Everything but the files of an opened, never started run counts as use.
        used = sorted(entry.name for entry in path.iterdir() if entry.name not in BEFORE_START)
        if used and resume is None:
            raise RunDirectoryError(
                f"output_dir {path} has been used ({', '.join(used[:3])}{', ...' if len(used) > 3 else ''}); "
                "pass --resume auto or another --output_dir"
            )
        stored = path / CONFIG_FILE
        if used:
            _check_same_run(stored, config)
        write_text(stored, json.dumps(config, indent=1, sort_keys=True) + "\n")
        return lock
    except BaseException:
        os.close(lock)
        raise


def hold_directory(path: Path) -> RunDirectory:
    """Take `path` for this process whatever is in it: for what looks after the runs below it.

    Raises:
        RunDirectoryError: another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    return RunDirectory(path, _locked(path))


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`field: old -> new` for every field that changes the result, in alphabetical order; absent ones say so.

    The size of a step changes it, not who computes it: the product of `BATCH_FIELDS` is compared.
    """
    before, after = (
        {name: value for name, value in _with_step_size(_flat(each)).items() if not _is_free(name)}
        for each in (old, new)
    )
    return _changes(before, after)


def _check_same_run(stored: Path, config: Mapping[str, Any]) -> None:
    if not stored.is_file():
        raise RunDirectoryError(f"{stored.parent} is no run directory (no {CONFIG_FILE}); choose another --output_dir")
    try:
        old = json.loads(stored.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(
            f"{stored} is not JSON ({error}); resume from a copy or use another --output_dir"
        ) from error
    if differences := config_differences(old, config):
        raise RunDirectoryError(
            f"the run in {stored.parent} was started with another configuration; take these back, "
            f"or use another --output_dir: {'; '.join(differences)}"
        )


def _check_same_everywhere(config: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with different configurations, data or models.

    Fields that are free when a run is resumed are not among ranks: when to save, to evaluate, how to pack a step, all
    must do at the same moment and alike.
    """
    for number, theirs in enumerate(gather(config, "the configurations of the others")):
        if differences := _changes(_flat(theirs), _flat(config)):
            raise RunDirectoryError(
                f"rank {number} was started with another configuration than rank {rank()}; every rank needs the same "
                f"files and flags: {'; '.join(differences)}"
            )


def _with_step_size(fields: dict[str, Any]) -> dict[str, Any]:
    sizes = [fields.pop(name, None) for name in BATCH_FIELDS]
    given = [each for each in sizes if each is not None]
    return fields | ({" x ".join(BATCH_FIELDS): prod(given)} if given else {})


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`field: old -> new` of flat configurations, in alphabetical order."""
    # As JSON, because what is stored or was sent went through it: a tuple is a list there.
    shown = [
        (name, *(json.dumps(each[name]) if name in each else "absent" for each in (before, after)))
        for name in sorted(before.keys() | after.keys())
    ]
    return [f"{name}: {was} -> {now}" for name, was, now in shown if was != now]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in NOT_SEMANTIC)


def _locked(path: Path) -> int:
    """Descriptor of the owner file with an exclusive lock on it, and this process written into it."""
    lock = os.open(path / OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 4096).decode(errors="replace").strip()
        os.close(lock)
        raise RunDirectoryError(
            f"another run is using {path} ({owner or 'it is just starting'}); wait for it or use another --output_dir"
        ) from None
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    os.ftruncate(lock, 0)
    os.pwrite(lock, owner.encode(), 0)
    return lock
