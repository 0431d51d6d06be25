"""One sandboxed process as the slot sees it: how it is started, and the pipes to and from it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastrl.rewards.sandbox.layers import ENVIRONMENT, Layers, bwrap_arguments, doors

SENT_INSIDE = ("seccomp", "landlock", "values", "inside")  # in the order in which they import one another
_BOOT = """
import sys, types
for name, text in {files!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.main()
"""


class Guest:
    """A process under the layers, and what it has written so far.

    Attributes:
        process: the process this one started: bubblewrap, or without it the interpreter.
        pidfd: readable once it has ended.
        records: descriptor of its JSON lines.
        outputs: descriptors of its stdout and stderr.
        waiting: descriptor -> bytes that it has still to be given.
        is_ready: it has closed its doors; from here on, what it says may be a lie.
        written: bytes it has written on all its descriptors.
    """

    def __init__(self, layers: Layers, limits: Mapping[str, Any], uid: int, job: Mapping[str, Any]) -> None:
        """Start it with one job for `inside.main`; `job["stdin"]` is given to its stdin."""
        self.home = "/tmp"
        if not layers.bwrap:
            self.home = tempfile.mkdtemp(prefix="fastrl-sandbox-")
            if layers.drops_uid:
                os.chown(self.home, uid, uid)
        requests, self.requests = os.pipe()
        self.records, records = os.pipe()
        self.process = _start(layers, limits, uid, self.home, (requests, records))
        os.close(requests)
        os.close(records)
        self.pidfd = os.pidfd_open(self.process.pid)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdin = self.process.stdin.fileno()
        self.outputs = (self.process.stdout.fileno(), self.process.stderr.fileno())
        first = {"doors": doors(layers, limits, self.home), **{key: job[key] for key in job if key != "stdin"}}
        self.waiting = {
            self.requests: json.dumps(first).encode() + b"\n",
            self.stdin: job["stdin"].encode(errors="surrogatepass"),
        }
        self.text = dict.fromkeys((self.records, *self.outputs), b"")
        self.is_ready = False
        self.written = 0
        for descriptor in (*self.waiting, *self.text):
            os.set_blocking(descriptor, False)

    def give(self, line: bytes) -> None:
        """Send one more line of JSON."""
        self.waiting[self.requests] = self.waiting.get(self.requests, b"") + line

    def feed(self, descriptor: int) -> None:
        """Write what fits. Stdin is closed behind its last byte, requests stay open; nobody reading is no error."""
        try:
            count = os.write(descriptor, self.waiting[descriptor][:65536]) if self.waiting[descriptor] else 0
            self.waiting[descriptor] = self.waiting[descriptor][count:]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.waiting[descriptor] = b""
        if not self.waiting[descriptor]:
            del self.waiting[descriptor]
            if descriptor == self.stdin:
                assert self.process.stdin is not None
                self.process.stdin.close()

    def take(self, descriptor: int) -> bool:
        """Read what is there; False at the end of the stream."""
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return True
        self.text[descriptor] += data
        self.written += len(data)
        return bool(data)

    def take_lines(self) -> list[bytes]:
        """The complete lines among the records read so far, each once."""
        *lines, self.text[self.records] = self.text[self.records].split(b"\n")
        return lines

    def exit_status(self) -> int | None:
        """As a shell reports it: 128 and the signal; None while it runs."""
        status = self.process.poll()
        return 128 - status if status is not None and status < 0 else status

    def close(self) -> None:
        """Close every descriptor; the process must be dead."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        for descriptor in (self.requests, self.records, self.pidfd):
            os.close(descriptor)


def _start(
    layers: Layers, limits: Mapping[str, Any], uid: int, home: str, passed: tuple[int, int]
) -> subprocess.Popen[bytes]:
    command = [layers.python, "-I", "-B", "-X", "utf8", "-c", _program(), *map(str, passed)]
    environment = {**ENVIRONMENT, "HOME": home, "TMPDIR": home}
    options: tuple[int, ...] = ()
    if layers.bwrap:
        # Through a file and with an empty environment: its own command line and environment can be read inside.
        options = (_readable("\0".join(bwrap_arguments(layers, limits))),)
        command, environment = [layers.bwrap, "--args", str(options[0]), "--", *command], {}
    try:
        return subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(*passed, *options),
            start_new_session=True,
            user=uid if layers.drops_uid else None,
            group=uid if layers.drops_uid else None,
            extra_groups=[] if layers.drops_uid else None,
        )
    finally:
        for descriptor in options:
            os.close(descriptor)


def _readable(text: str) -> int:
    descriptor = os.memfd_create("options", 0)
    os.write(descriptor, text.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@cache
def _program() -> str:
    folder = Path(__file__).parent
    files = {f"fastrl.rewards.sandbox.{name}": (folder / f"{name}.py").read_text() for name in SENT_INSIDE}
    return _BOOT.format(files=files)
