"""Stopping on purpose: the first SIGTERM or Ctrl-C asks for a checkpoint, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command with --resume auto

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Owner of the two signal handlers while it is open; poll it between steps and inside every wait.

    Python runs handlers in the main thread only, so elsewhere it installs nothing and never reports a request.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Whether a signal has asked the run to save and exit with `EXIT_INTERRUPTED`."""
        return self._requested

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            os._exit(128 + number)
        self._requested = True
        # print() is not safe in a handler: the signal may have come in the middle of another print.
        os.write(2, b"\nstopping: saving a checkpoint after this step (again to exit at once)\n")
