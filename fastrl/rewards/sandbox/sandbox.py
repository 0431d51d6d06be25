"""A pool of slots that run submissions in the sandbox, and the refusal to run without one."""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from fastrl.rewards.sandbox.layers import (
    FIRST_UID,
    MOST_SLOTS,
    Layers,
    as_json,
    found_layers,
    missing_layers,
    without,
)
from fastrl.rewards.sandbox.self_test import self_test
from fastrl.rewards.sandbox.slot import STARTUP_SECONDS

LOG = logging.getLogger(__name__)
GRACE_SECONDS = 20.0  # for a slot to end what its submission left
# The slot imports the files of this folder alone: `fastrl.rewards` holds things that load torch.
_SLOT = """
import sys, types
name = "fastrl.rewards.sandbox"
for end in (6, 14, 22):
    package = sys.modules[name[:end]] = types.ModuleType(name[:end])
    package.__path__ = [{folder!r}] if end == 22 else []
from fastrl.rewards.sandbox.slot import main
main({descriptor}, {uid})
"""


class Sandbox:
    """Owns the slots; each is a process without environment or secrets that runs one test case at a time.

    Slots are started when first needed and die with this process. Thread-safe. A sandbox belongs to the process that
    made it: make another after a fork.

    Attributes:
        layers: what submissions run under.
        missing: layer that is off -> how to get it; empty when strict.
    """

    def __init__(self, *, slots: int | None = None, python: str = "", strict: bool = True) -> None:
        """Find the layers and test them, in about a third of a second.

        Args:
            slots: test cases that may run at one time; the number of cores by default.
            python: interpreter that runs the submissions, reachable for every user; the system's by default.
            strict: refuse to work unless every layer holds. Otherwise bubblewrap may be absent, which is logged with
                every grading; the other layers may not.

        Raises:
            RuntimeError: a layer is missing or does not hold; the message says which, and what to do.
            ValueError: slots is out of range.
        """
        count = slots or len(os.sched_getaffinity(0))
        if not 1 <= count <= MOST_SLOTS:
            raise ValueError(f"slots must be from 1 to {MOST_SLOTS}, got {count}")
        self.layers = usable_layers(found_layers(python), strict=strict)
        self.missing = missing_layers(self.layers)
        self._free: queue.SimpleQueue[Slot | int] = queue.SimpleQueue()
        self._all: dict[int, Slot] = {}
        self._lock = Lock()
        for number in range(count):
            self._free.put(number)
        atexit.register(self.close)

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The outcome of one job of `fastrl.rewards.sandbox.slot`; waits for a free slot. A failing slot is INFRA."""
        slot = self._free.get()
        number = slot if isinstance(slot, int) else slot.number
        after: Slot | int = number
        try:
            if isinstance(slot, int):
                slot = Slot(number, self.layers)
                with self._lock:
                    self._all[number] = slot
            outcome = slot.run(job)
            after = slot
        except (OSError, ValueError) as error:
            if isinstance(slot, Slot):
                slot.close()
            outcome = {"status": "INFRA", "detail": f"a sandbox slot failed: {type(error).__name__}: {error}"}
        finally:
            self._free.put(after)
        return outcome

    def close(self) -> None:
        """End every slot and what runs in it."""
        with self._lock:
            for slot in self._all.values():
                slot.close()
            self._all.clear()
        atexit.unregister(self.close)


class Slot:
    """A slot's process, and this end of its socket."""

    def __init__(self, number: int, layers: Layers) -> None:
        self.number = number
        self.socket, theirs = socket.socketpair()
        code = _SLOT.format(folder=str(Path(__file__).parent), descriptor=theirs.fileno(), uid=FIRST_UID + number)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            env={},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes its end
        )
        theirs.close()
        self.socket.settimeout(STARTUP_SECONDS)
        self.socket.sendall(as_json(layers).encode() + b"\n")
        self.lines = self.socket.makefile("rb")

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One job's outcome.

        Raises:
            OSError, ValueError: the slot is gone or does not answer in time.
        """
        self.socket.settimeout(STARTUP_SECONDS + job["limits"]["seconds"] + GRACE_SECONDS)
        self.socket.sendall(json.dumps(job).encode() + b"\n")
        line = self.lines.readline()
        if not line:
            raise ConnectionError("its process ended")
        outcome: dict[str, Any] = json.loads(line)
        return outcome

    def close(self) -> None:
        """Close the socket, upon which the slot ends all it started and itself."""
        self.lines.close()
        self.socket.close()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def usable_layers(layers: Layers, *, strict: bool) -> Layers:
    """The layers that are there and hold.

    Args:
        layers: those the machine claims to have.
        strict: see `Sandbox`.

    Raises:
        RuntimeError: one is missing or does not hold.
    """
    missing = missing_layers(layers)
    optional = {"bwrap", "uid"}
    lacking = missing if strict else {name: remedy for name, remedy in missing.items() if name not in optional}
    if lacking:
        weaker = "; strict=False runs the weaker layers" if strict and set(lacking) <= optional else ""
        listed = "; ".join(f"{name}: {remedy}" for name, remedy in lacking.items())
        raise RuntimeError(f"the sandbox lacks {', '.join(lacking)} and does not run hostile code. {listed}{weaker}")
    leaks = self_test(layers, run_once)
    if not strict and layers.bwrap and leaks.keys() & {"start", "bwrap"}:
        return usable_layers(without(layers, "bwrap"), strict=False)
    for name in missing:
        leaks.pop(name, None)
    if leaks:
        listed = "; ".join(f"{name}: {', '.join(sentences)}" for name, sentences in leaks.items())
        hint = (
            "; bubblewrap needs user namespaces (sysctl user.max_user_namespaces, or the container's seccomp profile)"
        )
        raise RuntimeError(f"the sandbox does not hold: {listed}{hint if 'start' in leaks and layers.bwrap else ''}")
    return layers


def run_once(layers: Layers, job: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome of one job in a slot of its own, under any layers."""
    slot = Slot(0, layers)
    try:
        return slot.run(job)
    finally:
        slot.close()
