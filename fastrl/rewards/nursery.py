"""The trainer's handle on the process that forks reward workers; `fastrl.rewards.worker` is the other side."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence

from fastrl.rewards.frames import FrameError, receive_exactly, receive_frame, send_frame

REWARD_WORKER = "fastrl.rewards.worker"
SECONDS_TO_IMPORT = 120.0  # for the modules of all rewards together; some import torch
SECONDS_TO_ANSWER = 30.0  # a fork or a kill takes milliseconds
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from importlib import import_module; "
    "import_module(sys.argv[4]).main(int(sys.argv[1]), int(sys.argv[2]))"
)


class Nursery:
    """Owns the process; it ends, with every worker, when this object is closed, collected, or dies with its process.

    Args:
        specs: of the reward functions, which are imported there; a worker knows them by their place.
        module: whose `main` runs there; another one than that of reward workers may want other specs.

    Raises:
        RuntimeError: a function cannot be imported there in time.
    """

    def __init__(self, specs: Sequence[str], *, module: str = REWARD_WORKER) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path), module],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Many workers share the cores: none of them may use all for one matrix product.
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # Ctrl-C is the trainer's to handle
            )
        self._close = weakref.finalize(self, _end, self._control, self._process)
        try:
            send_frame(self._control, json.dumps(list(specs)))
            if not select.select([self._control], [], [], SECONDS_TO_IMPORT)[0]:
                raise FrameError(f"no sign of life in {SECONDS_TO_IMPORT:.0f} seconds")
            answer = receive_frame(self._control)
        except FrameError as error:
            self.close()
            raise RuntimeError(f"the process that runs {', '.join(specs)} did not start: {error}") from error
        if "error" in answer:
            self.close()
            raise RuntimeError(f"a worker cannot import {', '.join(specs)}:\n{answer['error']}")
        self._control.settimeout(SECONDS_TO_ANSWER)

    def fork(self, channel: socket.socket) -> int:
        """Start a worker that reads from the other end of `channel`; return its process id."""
        try:
            socket.send_fds(self._control, [b"S"], [channel.fileno()])
        except OSError as error:
            raise FrameError(str(error)) from error
        return self._answer()

    def kill(self, pid: int) -> str:
        """End a worker and its process group; return how it ended, in words."""
        try:
            self._control.sendall(b"K" + pid.to_bytes(4, "big"))
        except OSError as error:
            raise FrameError(str(error)) from error
        code = self._answer()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def close(self) -> None:
        """End the process and its workers; a second call does nothing."""
        self._close()

    def _answer(self) -> int:
        return int.from_bytes(receive_exactly(self._control, 4), "big", signed=True)


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()  # which it sees, kills its workers and ends
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
