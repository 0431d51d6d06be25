"""A slot: a process that holds no secret, runs one test case at a time in the sandbox, and reports what came out.

It is started with an empty environment and no descriptor but its end of a socket. It reads a line of JSON, a job, and
writes a line of JSON, an outcome. Verdicts that need expected values are not its business: it never has them,
except a check's script, which runs in a sandboxed process of its own.

    job      {"role": "program" | "function" | "script", "source", "stdin", "limits", "call" | "script", ...}
    outcome  {"status": a Status, or "DONE" with "stdout" or "value"; "detail"}
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import time
from typing import Any

from fastrl.rewards.sandbox.guest import Guest
from fastrl.rewards.sandbox.layers import Layers, from_json
from fastrl.rewards.sandbox.watch import become_subreaper, descendants, end_all, memory_bytes

STARTUP_SECONDS = 30.0
LOOK_SECONDS = 0.1
MOST_CHECK_BYTES = 64 << 20
_SIGXCPU, _SIGKILL = 128 + 24, 128 + 9


def main(descriptor: int, uid: int) -> None:
    """Serve jobs until the other end of the socket closes or the process that started this one is gone."""
    become_subreaper()
    control = socket.socket(fileno=descriptor)
    parent = os.getppid()
    lines = control.makefile("rb")
    layers = from_json(lines.readline().decode())
    while line := lines.readline():
        run = Run(json.loads(line), layers, uid, control, parent)
        outcome = run.outcome()
        control.sendall(json.dumps(outcome).encode() + b"\n")


class Run:
    """One job: its guests, and the loop that serves them until there is an outcome."""

    def __init__(self, job: dict[str, Any], layers: Layers, uid: int, control: socket.socket, parent: int) -> None:
        self.job, self.limits, self.control, self.parent = job, job["limits"], control, parent
        self.selector = selectors.DefaultSelector()
        self.result: dict[str, Any] | None = None
        role = "program" if job["role"] == "program" else "function"
        work = {"role": role, "source": job["source"], "stdin": job["stdin"]}
        self.worker = Guest(layers, self.limits, uid, work)
        self.guests = [self.worker]
        self.is_asked = role == "function"
        if job["role"] == "script":
            check = {"role": "script", "source": job["script"], "entry_point": job["entry_point"], "stdin": ""}
            self.guests.append(Guest(layers, self.limits, uid, check))
            self.is_asked = False
        elif role == "function":
            self.worker.give(json.dumps(job["call"]).encode() + b"\n")
        self.started: float | None = None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    def outcome(self) -> dict[str, Any]:
        """Serve the guests to the end; afterwards none of their processes is alive."""
        for guest in self.guests:
            for descriptor in (guest.records, *guest.outputs, guest.pidfd):
                self.selector.register(descriptor, selectors.EVENT_READ, guest)
        self.selector.register(self.control, selectors.EVENT_READ, None)
        next_look = 0.0
        while self.result is None:
            self._register_writers()
            events = self.selector.select(LOOK_SECONDS)
            if os.getppid() != self.parent or any(key.data is None for key, _ in events):
                self._end()
                os._exit(0)  # nobody waits for an outcome
            for key, _ in events:
                if self.result is None:
                    self._serve(key.data, key.fd)
            now = time.monotonic()
            if self.result is None and now > self.deadline:
                self._finish("INFRA" if self.started is None else "TIMEOUT", "no end within the limit")
            if self.result is None and self.started is not None and now >= next_look:
                self._look_at_memory()
                next_look = max(now, self.started) + LOOK_SECONDS
        self._end()
        return self.result

    def _finish(self, status: str, detail: str = "", **more: Any) -> None:
        self.result = {"status": status, "detail": detail, **more}

    def _register_writers(self) -> None:
        for guest in self.guests:
            for descriptor in guest.waiting:
                if descriptor not in self.selector.get_map():
                    self.selector.register(descriptor, selectors.EVENT_WRITE, guest)

    def _serve(self, guest: Guest, descriptor: int) -> None:
        if descriptor in guest.waiting:
            guest.feed(descriptor)
            if descriptor not in guest.waiting:
                self.selector.unregister(descriptor)
        elif descriptor == guest.pidfd:
            self._ended(guest)
        elif not guest.take(descriptor):
            self.selector.unregister(descriptor)
        else:
            is_over = guest.written > self.limits["output_kib"] * 1024
            if (guest is self.worker and is_over) or guest.written > MOST_CHECK_BYTES:
                self._finish("OUTPUT", f"more than {self.limits['output_kib']} KiB")
            elif descriptor == guest.records:
                self._hear(guest)

    def _hear(self, guest: Guest) -> None:
        for line in guest.take_lines():
            if self.result is not None:
                return
            try:
                record = json.loads(line)
                kind, rest = str(record[0]), [*map(_short, record[1:3]), "", ""]
            except (ValueError, RecursionError, LookupError, TypeError):
                self._finish("OUTPUT", "records that are no JSON")
                return
            if not guest.is_ready:
                self._first_word(guest, kind, rest)
            elif guest is self.worker:
                self._worker_said(kind, rest, line, record)
            elif kind == "call":
                self.is_asked = True
                self.worker.give(line + b"\n")
            else:
                self._finish(rest[0], rest[1])

    def _first_word(self, guest: Guest, kind: str, rest: list[str]) -> None:
        if kind != "ready":
            self._finish("INFRA", f"the sandbox could not be closed: {rest[0]}")
            return
        guest.is_ready = True
        if all(guest.is_ready for guest in self.guests):
            self.started = time.monotonic()
            self.deadline = self.started + self.limits["seconds"]

    def _worker_said(self, kind: str, rest: list[str], line: bytes, record: list[Any]) -> None:
        """What hostile code may have written: an answer to a question that was asked, or the end of the run."""
        if kind == "compile":
            self._finish("COMPILE", rest[0])
        elif kind == "unreadable":
            self._finish("OUTPUT", rest[0])
        elif kind not in ("value", "error") or not self.is_asked:
            self._finish("MEMORY" if rest[0] == "MemoryError" else "RUNTIME", f"{rest[0]}: {rest[1]}")
        elif len(self.guests) > 1:
            self.is_asked = False
            self.guests[1].give(line + b"\n")
        elif kind == "error":
            self._finish("MEMORY" if rest[0] == "MemoryError" else "RUNTIME", f"{rest[0]}: {rest[1]}")
        else:
            self._finish("DONE", value=record[1] if len(record) > 1 else None)

    def _ended(self, guest: Guest) -> None:
        """A guest's first process is gone: read what it left in its pipes, then judge."""
        self.selector.unregister(guest.pidfd)
        status = guest.exit_status()
        end_all([guest.process.pid for guest in self.guests])
        for descriptor in (guest.records, *guest.outputs):
            while self.result is None and descriptor in self.selector.get_map():
                self._serve(guest, descriptor)
        if self.result is not None:
            return
        error = guest.text[guest.outputs[1]].decode(errors="replace")[-500:].strip()
        if not guest.is_ready:
            self._finish("INFRA", f"the sandbox did not start ({status}): {error}")
        elif status == _SIGXCPU or (status == _SIGKILL and self._could_use_its_cpu_time()):
            self._finish("TIMEOUT", f"more than {self.limits['cpu_seconds']} s of CPU time")
        elif guest is not self.worker:
            self._finish("INFRA", f"the check ended ({status}) without a verdict: {error}")
        elif self.job["role"] == "program" and status == 0:
            self._finish("DONE", stdout=guest.text[guest.outputs[0]].decode(errors="replace"))
        else:
            last = error.rpartition("\n")[2]
            self._finish("MEMORY" if last.startswith("MemoryError") else "RUNTIME", f"ended ({status}): {last}")

    def _could_use_its_cpu_time(self) -> bool:
        """Whether a SIGKILL can be the one that follows an ignored SIGXCPU."""
        return self.started is not None and time.monotonic() - self.started >= self.limits["cpu_seconds"]

    def _look_at_memory(self) -> None:
        if memory_bytes(descendants()) > self.limits["memory_mib"] << 20:
            self._finish("MEMORY", f"more than {self.limits['memory_mib']} MiB")

    def _end(self) -> None:
        end_all([guest.process.pid for guest in self.guests])
        self.selector.close()
        for guest in self.guests:
            guest.close()
            if guest.home != "/tmp":
                shutil.rmtree(guest.home, ignore_errors=True)


def _short(value: Any) -> str:
    return value[:500] if isinstance(value, str) else ""
