"""A TCP line to a server that can be cut, while the server goes on."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Thread, Timer
from typing import Literal
from urllib.parse import urlsplit

Cut = Literal["hold", "tear"]
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close that says the connection is broken, not that it ended


class Cable:
    """Forwards connections to a server, until it is cut: held, as by lost packets, or torn, as by a lost route.

    Args:
        url: of the server.
        cut_at: asked with every chunk that goes to the server; how to cut the line behind it, or None.
        seconds: that a cut lasts.

    Attributes:
        url: the near end.
        cuts: those that there were.
    """

    def __init__(self, url: str, cut_at: Callable[[bytes], Cut | None], *, seconds: float) -> None:
        self._far = ("127.0.0.1", urlsplit(url).port)
        self._cut_at, self._seconds = cut_at, seconds
        self._changed = Condition()
        self._state: Cut | None = None
        self._ends: list[socket.socket] = []
        self.cuts: list[Cut] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self._break_all()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._state == "tear":
                    _break(near)
                    continue
                far = socket.create_connection(self._far)
                self._ends += [near, far]
                Thread(target=self._pump, args=(near, far, self._cut_at), daemon=True).start()
                Thread(target=self._pump, args=(far, near, lambda chunk: None), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, cut_at: Callable[[bytes], Cut | None]) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                with self._changed:
                    self._changed.wait_for(lambda: self._state != "hold")
                cut = cut_at(chunk)
                self._state = "hold" if cut else self._state  # no reply comes back
                target.sendall(chunk)
                if cut is not None:
                    time.sleep(0.2)  # the server has read it by then
                    self._cut(cut)
            target.shutdown(socket.SHUT_WR)

    def _cut(self, cut: Cut) -> None:
        self._state = cut
        self.cuts.append(cut)
        if cut == "tear":
            self._break_all()
        Timer(self._seconds, self._mend).start()

    def _mend(self) -> None:
        with self._changed:
            self._state = None
            self._changed.notify_all()

    def _break_all(self) -> None:
        while self._ends:
            _break(self._ends.pop())


def _break(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
    end.close()
