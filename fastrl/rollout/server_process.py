"""A vLLM server of our own: started on a free port with a random key, watched, ended with everything it started."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import fastrl
from fastrl.rollout.server_guard import API_KEY_VARIABLE, is_loopback
from fastrl.rollout.server_http import Client, ServerError, ServerLostError
from fastrl.rollout.server_main import WITH_TRAINER, group_lives

LOOPBACK = "127.0.0.1"
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_DIE = 10.0
TAIL_BYTES = 6000
LOCAL = {"VLLM_HOST_IP": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo"}  # where its own processes meet
MODULE = "fastrl.rollout.server_main"
# What vLLM's log says, what it means for the user.
CAUSES = {
    "Address already in use": "the port is in use; choose another rollout.server.port, or null for a free one",
    "out of memory": "it does not fit into the memory; lower rollout.server.gpu_memory_utilization or use more devices",
    "No available memory for the cache blocks": "no memory is left for the cache; raise "
    "rollout.server.gpu_memory_utilization",
    "less than requested memory for kv": "no memory is left for the cache; lower rollout.server.kv_cache_gib",
    "less than desired": "less memory is free than rollout.server.gpu_memory_utilization asks for; lower it",
    "KV cache is needed, which is larger": "the cache of one sequence does not fit; lower max_completion_length or "
    "raise rollout.server.gpu_memory_utilization",
    "are not supported for now": "vLLM does not support this model",
    "has no vLLM implementation": "vLLM does not support this model",
    "Unsupported CPU attention": "vLLM's CPU attention does not support this model's head size",
    "No module named 'vllm'": "the interpreter of rollout.server.python has no vLLM",
    "unrecognized arguments": "rollout.server.arguments holds an option this vLLM does not know",
}


class StartError(ServerError):
    """A server did not come up; the message names the cause where its log shows one."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server.

    Attributes:
        model: directory of the weights, the tokenizer and the configuration.
        log: file that everything it prints is appended to.
        bind: address to listen on.
        port: None takes a free one.
        python: interpreter that has vLLM; it may have another torch than the trainer.
        arguments: of `vllm serve`, after ours.
        environment: added to the trainer's.
        seconds: to come up.
    """

    model: str
    log: Path
    bind: str = LOOPBACK
    port: int | None = None
    python: str = sys.executable
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 600.0


class ServerProcess:
    """Owner of one server process and all its children; `start` may be called again after `stop`.

    Its key is random, and handed over in its environment. It listens on the loopback interface alone, unless told
    otherwise, which is warned of.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._key = secrets.token_urlsafe(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = _nothing

    def start(self, *, retries: int) -> Client:
        """Start, wait until it answers, and return the client that talks to it.

        Args:
            retries: of the client.

        Raises:
            StartError: it ended, or did not answer in time.
        """
        self.stop()
        if not is_loopback(self.launch.bind):
            warnings.warn(
                f"the vLLM server listens on {self.launch.bind}: its routes ask for a key, but without TLS the network "
                "can read it; keep the port inside a private network",
                stacklevel=2,
            )
        port = self.launch.port or _free_port()
        # The server needs our package, and nothing else of what stands beside it.
        imports = tempfile.mkdtemp(prefix="fastrl-")
        Path(imports, "fastrl").symlink_to(Path(fastrl.__file__).resolve().parent)
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        with self.launch.log.open("ab") as log:
            written = log.tell()
            ours = ["--host", self.launch.bind, "--port", str(port)]
            self._process = subprocess.Popen(
                [self.launch.python, "-m", MODULE, WITH_TRAINER, self.launch.model, *ours, *self.launch.arguments],
                stdin=subprocess.PIPE,  # closes when this process ends, however it does: the server then ends too
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(imports),
                start_new_session=True,  # Ctrl-C is the trainer's; and one signal ends the whole group
            )
        host = LOOPBACK if self.launch.bind in ("0.0.0.0", "::") else self.launch.bind
        self._end = weakref.finalize(self, _kill, self._process, imports)
        client = Client(f"http://{host}:{port}", api_key=self._key, retries=retries)
        self._wait(client, self._process, written)
        return client

    def is_alive(self) -> bool:
        """Whether the process runs; it may still be deaf."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Kill the server and every process it started; a second call does nothing."""
        self._end()

    def _wait(self, client: Client, process: subprocess.Popen[bytes], written: int) -> None:
        deadline = time.monotonic() + self.launch.seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self.stop()
                raise StartError(self._ended(f"ended with exit code {process.returncode}", written))
            with suppress(ServerLostError):
                if client.status("/health", with_key=True, seconds=5.0) == 200:
                    return
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.stop()
        raise StartError(self._ended(f"did not answer in {self.launch.seconds:g} s", written))

    def _ended(self, what: str, written: int) -> str:
        with self.launch.log.open("rb") as log:
            log.seek(written)
            text = log.read().decode(errors="replace")
        cause = next((meaning for sign, meaning in CAUSES.items() if sign in text), None)
        said = "" if cause is None else f": {cause}"
        tail = "" if cause is not None else "\n" + text[-TAIL_BYTES:]
        return f"the vLLM server of {self.launch.model} {what}{said}; its log is {self.launch.log}{tail}"

    def _environment(self, imports: str) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.endswith("API_KEY") and name not in ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        }
        return {
            **inherited,
            "PYTHONPATH": imports,
            **(LOCAL if is_loopback(self.launch.bind) else {}),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU the trainer needs cores too
            **self.launch.environment,
            API_KEY_VARIABLE: self._key,
        }


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])


def _nothing() -> None:
    pass


def _kill(process: subprocess.Popen[bytes], imports: str) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    # The group outlives its leader: after a kill of the API server its engine and workers are still in it.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_DIE)
    # A process that holds gigabytes takes a while to end, and the next server needs them.
    deadline = time.monotonic() + SECONDS_TO_DIE
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(imports, ignore_errors=True)
