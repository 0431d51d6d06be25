"""A server's process: what it is started with, why it did not start, and that nothing of it is left behind.

A program stands in for vLLM that starts like it: an API server on the port, with a child that sleeps.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fastrl
from fastrl.rollout.server_process import Launch, ServerProcess, StartError

PROGRAM = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()

def main():
    json.dump({"argv": sys.argv, "environment": dict(os.environ)}, open(os.environ["SEEN"], "w"))
    if "--say" in sys.argv:
        sys.exit(sys.argv[sys.argv.index("--say") + 1])
    subprocess.Popen(["sleep", "600"])
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def launch_of(folder: Path, *arguments: str) -> Launch:
    package = folder / "path" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True, exist_ok=True)
    (package / "main.py").write_text(PROGRAM)
    root = str(Path(fastrl.__file__).parents[1])
    paths = os.pathsep.join((str(folder / "path"), root))
    environment = {"PYTHONPATH": paths, "SEEN": str(folder / "seen.json")}
    return Launch("some/model", folder / "server.log", arguments=arguments, environment=environment, seconds=30.0)


def started(folder: Path, *arguments: str) -> ServerProcess:
    process = ServerProcess(launch_of(folder, *arguments))
    process.start(retries=0)
    return process


def seen(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


def running(group: int) -> list[int]:
    """Processes of a group that are more than zombies."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            state, _, process_group = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(int(name))
    return found


def assert_ends(group: int) -> None:
    deadline = time.monotonic() + 10.0
    while running(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running(group) == []


def group_of(process: ServerProcess) -> int:
    assert process._process is not None
    return process._process.pid


def test_the_key_is_random_and_travels_in_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "canary")
    process = started(tmp_path)
    try:
        found = seen(tmp_path)
        key = found["environment"]["VLLM_API_KEY"]
        assert len(key) >= 32
        assert "JUDGE_API_KEY" not in found["environment"]
        for pid in running(group_of(process)):
            assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        argv = found["argv"]
        assert argv[:3] == ["vllm", "serve", "some/model"]
        assert argv[argv.index("--middleware") + 1] == "fastrl.rollout.server_guard.BearerOnEveryRoute"
        assert argv[len(argv) - argv[::-1].index("--host")] == "127.0.0.1"
        assert found["environment"]["VLLM_HOST_IP"] == "127.0.0.1"
        assert key not in (tmp_path / "server.log").read_text()
    finally:
        process.stop()


def test_a_start_again_has_new_ground_and_the_old_one_is_gone(tmp_path: Path) -> None:
    process = started(tmp_path)
    first = group_of(process)
    process.start(retries=0)
    assert group_of(process) != first
    assert_ends(first)
    process.stop()
    assert running(group_of(process)) == []
    assert not process.is_alive()


@pytest.mark.parametrize("victim", ["watcher", "server", "worker"])
def test_whoever_is_killed_nothing_is_left(tmp_path: Path, victim: str) -> None:
    """vLLM's workers outlive its API server otherwise, with all their memory."""
    process = started(tmp_path)
    group = group_of(process)
    others = sorted(set(running(group)) - {group})
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in others}
    server = next(pid for pid, name in names.items() if name != "sleep")
    worker = next(pid for pid, name in names.items() if name == "sleep")
    os.kill({"watcher": group, "server": server, "worker": worker}[victim], signal.SIGKILL)
    if victim == "server":
        assert_ends(group)
    process.stop()
    assert running(group) == []


def test_a_server_ends_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    launch_of(tmp_path)
    script = (
        "import sys, time; from pathlib import Path; from tests.rollout.test_server_process import *\n"
        f"process = started(Path({str(tmp_path)!r})); print(group_of(process), flush=True); time.sleep(600)\n"
    )
    root = str(Path(fastrl.__file__).parents[1])
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert trainer.stdout is not None
    with trainer.stdout:
        group = int(trainer.stdout.readline())
    assert len(running(group)) == 3
    trainer.kill()
    trainer.wait()
    assert_ends(group)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("OSError: [Errno 98] Address already in use", "the port is in use; choose another rollout.server.port"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "lower rollout.server.gpu_memory_utilization"),
        ("Model architectures ['Foo'] are not supported for now.", "vLLM does not support this model"),
        ("serve: error: unrecognized arguments: --foo", "rollout.server.arguments holds an option"),
        ("something new", "exit code 1.*\n.*something new"),
    ],
)
def test_why_it_did_not_start_is_in_the_message(tmp_path: Path, said: str, message: str) -> None:
    with pytest.raises(StartError, match=message) as caught:
        started(tmp_path, "--say", said)
    assert str(tmp_path / "server.log") in str(caught.value)


def test_a_public_bind_is_warned_of(tmp_path: Path) -> None:
    process = ServerProcess(Launch("m", tmp_path / "log", bind="0.0.0.0", seconds=0.1, python="/bin/false"))
    with pytest.warns(UserWarning, match="listens on 0.0.0.0"), pytest.raises(StartError):
        process.start(retries=0)
    process.stop()
