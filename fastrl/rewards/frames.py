"""Messages between the trainer and reward workers: a length of four bytes, then JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
import socket
from typing import Any

LARGEST_FRAME = 256 * 2**20  # bytes; a reward that logs more is broken, and the trainer must not pay for it
_READ = 2**18


class FrameError(RuntimeError):
    """The other side is gone, or what it sent is no message."""


def send_frame(channel: socket.socket, text: str) -> None:
    """Send one JSON text; FrameError when the other side is gone or does not read."""
    data = text.encode()
    try:
        channel.sendall(len(data).to_bytes(4, "big") + data)
    except OSError as error:
        raise FrameError(f"cannot be sent to: {error}") from error


class Inbox:
    """Collects the bytes of one channel until they make a message."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._data = bytearray()

    def read(self) -> Any:
        """Read what is there, once; return a whole message, or None while it is not complete.

        Raises:
            FrameError: the channel is closed, or the message is too long or not JSON.
        """
        try:
            data = self._channel.recv(_READ)
        except OSError as error:
            raise FrameError(str(error)) from error
        if not data:
            raise FrameError("closed")
        self._data += data
        if len(self._data) < 4:
            return None
        size = int.from_bytes(self._data[:4], "big")
        if size > LARGEST_FRAME:
            raise FrameError(f"an answer of {size} bytes is more than {LARGEST_FRAME}")
        if len(self._data) < 4 + size:
            return None
        text, self._data = bytes(self._data[4 : 4 + size]), self._data[4 + size :]
        try:
            return json.loads(text)
        except ValueError as error:
            raise FrameError(f"the answer is not JSON: {error}") from error


def receive_frame(channel: socket.socket) -> Any:
    """Wait for one message; FrameError as `Inbox.read`."""
    inbox = Inbox(channel)
    while (message := inbox.read()) is None:
        pass
    return message


def receive_exactly(channel: socket.socket, size: int) -> bytes:
    """Wait for `size` bytes; FrameError when the channel closes before."""
    data = b""
    while len(data) < size:
        try:
            more = channel.recv(size - len(data))
        except OSError as error:
            raise FrameError(str(error)) from error
        if not more:
            raise FrameError("closed")
        data += more
    return data
