"""A server that runs, and which processes it has."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastrl.rollout.server_http import Client
from fastrl.rollout.server_process import ServerProcess
from tests.recipes.runs import Base


@dataclass(frozen=True)
class Running:
    """A server of a random model, whose tokenizer has no EOS of its own; each test brings its weights.

    Attributes:
        base: the model, and prompts that its tokenizer knows.
    """

    process: ServerProcess
    client: Client
    base: Base


def group_of(process: ServerProcess) -> list[int]:
    """A server's processes that run; a zombie does not."""
    assert process._process is not None
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.getpgid(int(name)) == process._process.pid and is_alive(int(name)):
                found.append(int(name))
    return found


def api_server_of(process: ServerProcess) -> int:
    """The child of the watcher: vLLM's API server."""
    assert process._process is not None
    return next(pid for pid in group_of(process) if _parent_of(pid) == process._process.pid)


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
