"""Every process a slot has started, directly or not: how much memory they hold, and their end.

The slot is a child subreaper: a process whose parent died becomes the slot's child, so none can get away.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress


def become_subreaper() -> None:
    """Make orphaned descendants this process's children.

    Raises:
        OSError: the kernel refuses.
    """
    set_child_subreaper = 36
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def descendants() -> list[int]:
    """Process ids below this process."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # After the name, which is in parentheses and may hold any byte: state, parent, ...
            parent = int(file.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def memory_bytes(processes: list[int]) -> int:
    """Memory of their own that they hold; pages they share through a file system count once for each."""
    total = 0
    for process in processes:
        with suppress(OSError), open(f"/proc/{process}/status", "rb") as file:
            for line in file:
                if line.startswith((b"RssAnon:", b"RssShmem:")):
                    total += int(line.split()[1]) * 1024
    return total


def end_all(children: list[int], *, seconds: float = 10.0) -> None:
    """Kill and reap every descendant.

    Args:
        children: processes this one started; with bubblewrap their end is the end of all.

    Raises:
        RuntimeError: one outlived `seconds`.
    """
    deadline = time.monotonic() + seconds
    _signal(set(children), signal.SIGKILL)
    for _ in range(50):
        if not _reap():
            return
        time.sleep(0.0002)
    while _reap():
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {descendants()} of a submission do not die")
        # A stopped process cannot fork: stop all, until a look finds no new one, before the first is killed.
        stopped: set[int] = set()
        while new := set(descendants()) - stopped:
            _signal(new, signal.SIGSTOP)
            stopped |= new
        _signal(stopped, signal.SIGKILL)
        time.sleep(0.001)


def _signal(processes: set[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _reap() -> bool:
    """Collect the dead children; whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
