"""Proof, at start-up, that each layer blocks what it should: a probe runs in the sandbox and tries."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from fastrl.rewards.sandbox.layers import Layers

PROBE_LIMITS = {
    "seconds": 20.0,
    "cpu_seconds": 10,
    "memory_mib": 512,
    "address_space_mib": 2048,
    "output_kib": 64,
    "processes": 8,
    "file_mib": 1,
}
# It prints {layer: [what it could do]}. It must harm nothing when it succeeds: it opens, and does not write.
_PROBE = r"""
import ctypes, json, os, resource, signal, socket, sys

canary, mib = sys.stdin.read().split()
found = {name: [] for name in ("uid", "bwrap", "landlock", "seccomp", "rlimits")}

def attempt(layer, sentence, action):
    try:
        if action() is not False:
            found[layer].append(sentence)
    except (OSError, ValueError):
        pass

def status(key):
    with open("/proc/self/status") as file:
        return next(line.split()[1] for line in file if line.startswith(key + ":"))

attempt("uid", "it runs as root", lambda: os.getuid() == 0)

attempt("bwrap", "it reads a file of the host", lambda: open(canary).read())
attempt("bwrap", "it sees /etc", lambda: os.path.exists("/etc/passwd"))
attempt("bwrap", "it sees other processes", lambda: sum(name.isdigit() for name in os.listdir("/proc")) > 3)
attempt("bwrap", "it has a network", lambda: len(open("/proc/net/dev").readlines()) != 3)
attempt("bwrap", "it has capabilities", lambda: int(status("CapEff"), 16) | int(status("CapBnd"), 16) != 0)
attempt("bwrap", "it can open kernel settings", lambda: open("/proc/sys/kernel/core_pattern", "r+b"))
attempt("bwrap", "it reads an environment", lambda: open("/proc/1/environ", "rb").read() != b"")
attempt("bwrap", "it has the host's name", lambda: os.uname().nodename != "sandbox")
attempt("bwrap", "it can write to the system", lambda: os.open("/usr/probe", os.O_CREAT | os.O_WRONLY))

attempt("landlock", "it can write to a closed directory", lambda: os.open("/closed/probe", os.O_CREAT | os.O_WRONLY))
attempt("landlock", "it can list /", lambda: os.listdir("/"))

libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    return getattr(libc, function)(*arguments) >= 0
attempt("seccomp", "it reads memory of processes", lambda: call("process_vm_readv", os.getpid(), 0, 0, 0, 0, 0))
attempt("seccomp", "unshare works", lambda: call("unshare", 0))
attempt("seccomp", "memfd_create works", lambda: call("memfd_create", b"probe", 0))
attempt("seccomp", "it can make a socket", lambda: socket.socket(socket.AF_INET).close())
attempt("seccomp", "it can make a unix socket", lambda: socket.socket(socket.AF_UNIX).close())
attempt("seccomp", "shared anonymous memory works", lambda: __import__("mmap").mmap(-1, 4096).close())

attempt("rlimits", "its CPU time has no limit", lambda: resource.getrlimit(resource.RLIMIT_CPU)[1] < 0)
attempt("rlimits", "its address space has no limit", lambda: resource.getrlimit(resource.RLIMIT_AS)[1] < 0)
def write_too_much():
    with open(os.environ["TMPDIR"] + "/large", "wb") as file:
        file.seek((int(mib) << 20) + 1)
        file.write(b"1")
def fork_too_often():
    children = []
    try:
        for _ in range(12):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
attempt("rlimits", "it can write more than file_mib", write_too_much)
if not 0 <= resource.getrlimit(resource.RLIMIT_NPROC)[1] <= 8:
    found["rlimits"].append("its processes have no limit")
else:
    # The kernel exempts root, whatever namespace it is in, and nobody else.
    attempt("uid", "it is root outside, or has no limit on processes", fork_too_often)
print(json.dumps(found))
"""

Runner = Callable[[Layers, Mapping[str, Any]], dict[str, Any]]


def self_test(layers: Layers, run: Runner) -> dict[str, list[str]]:
    """What a hostile program can do, by the layer that should have stopped it; empty when all hold.

    Args:
        layers: those to test. A file-system or network finding is put down to bubblewrap, even where landlock or
            seccomp would stop it too, and so shows only once neither does.
        run: runs a job of `slot` under layers.

    Returns:
        layer -> sentences. The key "start" says that the sandbox did not start at all.
    """
    with tempfile.TemporaryDirectory(prefix="fastrl-canary-") as folder:
        os.chmod(folder, 0o755)
        canary = os.path.join(folder, "canary")
        with open(canary, "w", encoding="utf-8") as file:
            file.write("canary")
        os.chmod(canary, 0o644)
        stdin = f"{canary} {PROBE_LIMITS['file_mib']}"
        job = {"role": "program", "source": _PROBE, "stdin": stdin, "limits": PROBE_LIMITS}
        outcome = run(layers, job)
    if outcome["status"] != "DONE":
        return {"start": [f"{outcome['status']}: {outcome['detail']}"]}
    found: dict[str, list[str]] = json.loads(outcome["stdout"])
    return {layer: sentences for layer, sentences in found.items() if sentences}
