"""What runs in the reward processes: a nursery that imports the functions once, and the workers it forks.

    trainer --control socket--> nursery --fork--> worker 1, 2, ...      each worker talks to the trainer directly

The nursery is a fresh interpreter, so nothing of the trainer's (CUDA, threads, locks) is forked; it runs no reward, so
a fork takes milliseconds and always starts from the same clean state. A worker dies with the nursery (a signal of the
kernel's), the nursery with the trainer (its end of the control socket closes, whatever ends the trainer), and first it
kills the process group of every worker.

Control: `S` with a socket attached -> fork a worker on it, answer its pid. `K` pid -> kill it and its process group,
answer its exit code.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

from fastrl.rewards.call import Fault, Judgement, call_rewards
from fastrl.rewards.frames import FrameError, receive_exactly, receive_frame, send_frame
from fastrl.rewards.protocol import RewardFunction
from fastrl.rewards.resolve import resolve_reward

SECONDS_TO_DIE = 5.0  # a killed process that is still there then waits for the kernel (a dead network disk)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


Work = Callable[[socket.socket], None]


def main(descriptor: int, trainer: int) -> None:
    """Run the nursery of reward workers."""
    serve_nursery(descriptor, trainer, _judging)


def serve_nursery(descriptor: int, trainer: int, prepare: Callable[[Any], Work]) -> None:
    """Run a nursery until the trainer closes the control socket.

    Args:
        descriptor: of the control socket.
        trainer: process id of the trainer.
        prepare: makes, of what the trainer asked for, what each worker does on its channel; imports happen here.
    """
    control = socket.socket(fileno=descriptor)
    _die_with_parent(trainer)
    os.dup2(2, 1)  # what a reward prints must not mix with what the recipe prints for other programs
    try:
        work = prepare(receive_frame(control))
    except BaseException:
        send_frame(control, json.dumps({"error": traceback.format_exc()}))
        return
    # The signal comes when the *thread* that started us ends, which may be long before the run does. From here on the
    # closed socket says it; while modules were imported nobody was listening.
    _prctl(_PR_SET_PDEATHSIG, 0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what workers leave behind becomes ours to kill
    gc.collect()
    gc.freeze()
    send_frame(control, json.dumps({"ready": True}))
    nursery = _Nursery(control, work)
    try:
        nursery.serve(trainer)
    finally:
        nursery.end()


class _Nursery:
    """Owns the workers: forks them, kills them, and knows how they ended."""

    def __init__(self, control: socket.socket, work: Work) -> None:
        self._control = control
        self._work = work
        self._alive: set[int] = set()
        self._ended: dict[int, int] = {}

    def serve(self, trainer: int) -> None:
        while os.getppid() == trainer:
            if not select.select([self._control], [], [], 1.0)[0]:
                continue
            try:
                command, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
                if not command:
                    return
                if command == b"S":
                    answer = self._fork(descriptors[0])
                else:
                    answer = self._kill(int.from_bytes(receive_exactly(self._control, 4), "big"))
                self._control.sendall(answer.to_bytes(4, "big", signed=True))
            except (FrameError, OSError):
                return  # the trainer is gone

    def end(self) -> None:
        for pid in self._alive:
            _kill_group(pid)
        self._kill_strays(but=set())

    def _fork(self, descriptor: int) -> int:
        nursery = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()  # a group of its own: its children can be killed with it
                _die_with_parent(nursery)
                self._control.close()
                self._work(socket.socket(fileno=descriptor))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)  # never back into the nursery's loop
        os.close(descriptor)
        self._alive.add(pid)
        return pid

    def _kill(self, pid: int) -> int:
        """Exit code of a worker, which is dead afterwards; minus the signal's number when one killed it."""
        if pid in self._alive:
            # One that ended by itself keeps its own exit code: it is still a zombie, and so is its group's number.
            self._reap()
            _kill_group(pid)
            deadline = time.monotonic() + SECONDS_TO_DIE
            while pid not in self._ended and time.monotonic() < deadline:
                self._reap()
                time.sleep(0.0002)
            self._alive.discard(pid)
            self._kill_strays(but=self._alive)
        return self._ended.pop(pid, -signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._alive:
                self._ended[pid] = os.waitstatus_to_exitcode(status)

    def _kill_strays(self, *, but: set[int]) -> None:
        """Kill what left a dead worker's process group and became our child, and what becomes it as those die."""
        deadline = time.monotonic() + SECONDS_TO_DIE
        while (strays := _children() - but - set(self._ended)) and time.monotonic() < deadline:
            for pid in strays:
                _kill_group(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            time.sleep(0.0002)


def _children() -> set[int]:
    """Of this process, those that ended and wait to be reaped included."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return {int(pid) for pid in file.read().split()}
    except OSError:
        return set()  # no such file on this system


def _judging(specs: Sequence[str]) -> Work:
    return partial(_judge, [resolve_reward(spec) for spec in specs])


def _judge(functions: Sequence[RewardFunction], channel: socket.socket) -> None:
    """Judge what arrives until the channel closes, which is also how the trainer ends a worker that is idle."""
    process = os.getpid()
    while True:
        try:
            request = receive_frame(channel)
        except FrameError:
            return
        started = time.perf_counter()
        judgement = call_rewards([functions[request["function"]]], _inputs(request["rows"], request["state"]))[0]
        if os.getpid() != process:  # a reward forked and let its child return: one of the two may answer
            os._exit(0)
        answer = _encoded(judgement) | {"seconds": time.perf_counter() - started}
        try:
            text = json.dumps(answer)
        except (TypeError, ValueError):
            answer |= {"extra": {}, "values": [{"fault": traceback.format_exc()}] * len(judgement.values)}
            text = json.dumps(answer)
        sys.stdout.flush()  # a worker is killed without notice, and what it printed should be seen before
        send_frame(channel, text)


def _inputs(rows: Sequence[Mapping[str, Any]], state: Mapping[str, Any] | None) -> dict[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "completions": [None] * len(rows),
        **columns,
        "trainer_state": None if state is None else SimpleNamespace(**state),
    }


def _encoded(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON. `whole`: the call failed as one, so that each item deserves a call of its own."""
    values, first = judgement.values, judgement.values[0]
    return {
        "values": [{"fault": value.message} if isinstance(value, Fault) else value for value in values],
        "extra": judgement.extra,
        "metrics": judgement.metrics,
        "whole": len(values) > 1 and isinstance(first, Fault) and all(value is first for value in values),
    }


def _die_with_parent(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the signal was asked for
        os._exit(1)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":  # elsewhere a worker ends when its channel closes, which a hanging one does not see
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
