"""One HTTP request to a vLLM server: with a deadline for the whole of it, and retries where they help.

The standard library's `http.client`, because it is enough: one connection per request (a completion takes far longer
than connecting; a closed connection is also how vLLM learns that nobody waits for it any more), and no dependency.
"""

from __future__ import annotations

import errno
import http.client
import io
import json
import random
import ssl
import sys
import time
from collections.abc import Callable
from socket import IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET, socket
from typing import Any, cast
from urllib.parse import urlsplit

RETRIED = frozenset({408, 429})  # and 5xx
CONNECT_SECONDS = 10.0
SECONDS_TO_MISS = (15, 15, 5)  # silence before the system asks whether the other machine is there, between two such
# questions, and how many go unanswered: 90 s in all. A shorter cut is TCP's to mend: what was sent arrives late.
MOST_BYTES = 1 << 28  # of a reply; one completion of 100,000 tokens takes 10 MiB


class ServerError(RuntimeError):
    """A server refused what was asked, or cannot do what the run needs; the message says what to change.

    Attributes:
        status: of its reply; 0 when there was none, or none of its own.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ServerLostError(ServerError):
    """A server does not answer, or only with errors of its own, whose status it has."""


class DeadlineError(ServerError):
    """A server took the request and gave no answer in time."""


class Client:
    """Where a server is and how to talk to it. Holds no connection, so any number of threads may use it.

    Args:
        url: `http://host:port` or `https://host:port`.
        api_key: sent as a bearer token; "" sends none.
        retries: further attempts after a broken connection or status 408, 429 or 5xx.
        backoff: longest wait before the first retry in seconds, doubled for each one after it.

    Raises:
        ValueError: a URL that is none, or that holds a password.
    """

    def __init__(self, url: str, *, api_key: str = "", retries: int = 4, backoff: float = 0.25) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} must be http://host:port or https://host:port")
        if parts.username is not None:
            raise ValueError(f"the URL of {parts.hostname} holds a user; give the key in an environment variable")
        self.url = url.rstrip("/")
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._key = api_key
        self._retries = retries
        self._backoff = backoff
        self._jitter = random.Random()  # not the global generator, which belongs to the run

    def get(self, path: str, *, seconds: float) -> Any:
        """The reply to a GET, read as JSON; see `call`."""
        return self.call("GET", path, None, deadline=time.monotonic() + seconds, retries=0)

    def post(self, path: str, body: Any = None, *, seconds: float) -> Any:
        """The reply to a POST that must not be sent twice; see `call`."""
        return self.call("POST", path, body, deadline=time.monotonic() + seconds, retries=0)

    def tell(self, path: str, body: Any = None, *, seconds: float) -> None:
        """A POST that must not be sent twice and whose reply says no more than that it was done; see `call`."""
        self.call("POST", path, body, deadline=time.monotonic() + seconds, retries=0, is_read=False)

    def call(
        self,
        method: str,
        path: str,
        body: Any,
        *,
        deadline: float,
        retries: int | None = None,
        is_pointless: Callable[[], bool] | None = None,
        is_read: bool = True,
    ) -> Any:
        """Send a request until there is a reply; read it as JSON (None when it is empty).

        Args:
            deadline: of all attempts together, on the monotonic clock.
            retries: None takes the client's.
            is_pointless: asked before each retry; true gives up.
            is_read: False takes any content, and returns None.

        Raises:
            ServerLostError: no connection, a broken or unreadable reply, or status 408, 429 or 5xx, to the end.
            DeadlineError: no reply before the deadline.
            ServerError: any other status.
        """
        attempts = 1 + (self._retries if retries is None else retries)
        for attempt in range(attempts):
            try:
                return self._sent(method, path, body, deadline, is_read=is_read)
            except _TransientError as error:
                wait = max(error.retry_after, self._jitter.uniform(0.0, self._backoff * 2**attempt))
                if attempt == attempts - 1 or time.monotonic() + wait >= deadline or (is_pointless and is_pointless()):
                    said = f"{self.url}{path}: {error}, after {_times(attempt + 1)}"
                    raise ServerLostError(said, status=error.status) from None
                time.sleep(wait)
        raise AssertionError("a loop over at least one attempt returns or raises")

    def status(self, path: str, *, with_key: bool, seconds: float) -> int:
        """The status of a GET, whatever it is; how checks find out which routes exist and who may use them.

        Raises:
            ServerLostError: no answer.
        """
        try:
            return self._exchange("GET", path, None, time.monotonic() + seconds, with_key=with_key)[0]
        except (_TransientError, DeadlineError) as error:
            raise ServerLostError(f"{self.url}{path}: {error}") from None

    def _sent(self, method: str, path: str, body: Any, deadline: float, *, is_read: bool) -> Any:
        status, retry_after, content = self._exchange(method, path, body, deadline)
        if status in RETRIED or status >= 500:
            raise _TransientError(f"status {status}: {self._message(content)}", retry_after, status=status)
        if status == 401:
            raise ServerError(
                f"{self.url} refuses the API key; rollout.server.api_key_env names the variable that holds it",
                status=status,
            )
        if status != 200:
            raise ServerError(f"{self.url}{path}: status {status}: {self._message(content)}", status=status)
        if not content or not is_read:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _TransientError(f"a reply that is no JSON: {self._message(content)}") from None

    def _exchange(
        self, method: str, path: str, body: Any, deadline: float, *, with_key: bool = True
    ) -> tuple[int, float, bytes]:
        """Status, seconds that Retry-After asks for, and content."""
        headers = {"Connection": "close", "Accept": "application/json"}
        if self._key and with_key:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        connection = self._connection(min(CONNECT_SECONDS, _left(deadline, self.url)))
        try:
            try:
                connection.connect()
            except OSError as error:
                raise _TransientError(f"cannot connect: {error}") from None
            _watch(connection.sock)
            connection.sock.settimeout(_left(deadline, self.url))
            connection.request(method, self._path + path, body=content, headers=headers)
            response = http.client.HTTPResponse(cast(socket, _TimedSocket(connection.sock, deadline)), method=method)
            response.begin()
            found = response.read(MOST_BYTES)
            if not response.isclosed() and response.read(1):
                raise ServerError(f"{self.url}{path}: the reply is longer than {MOST_BYTES} bytes")
            return response.status, _seconds(response.getheader("Retry-After")), found
        except TimeoutError as error:
            if error.errno == errno.ETIMEDOUT:  # of the system's: the other machine is gone
                raise _TransientError("the other machine no longer answers") from None
            raise DeadlineError(f"{self.url}{path}: no reply in time") from None
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(f"the connection broke: {type(error).__name__}: {error}") from None
        finally:
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)

    def _message(self, content: bytes) -> str:
        """What a server says, short and without the key, which some quote."""
        text = content[:4000].decode(errors="replace")
        try:
            found = json.loads(content)
            text = found["error"]["message"] if isinstance(found["error"], dict) else found["error"]
        except (ValueError, RecursionError, KeyError, TypeError):
            pass
        text = " ".join(str(text).split())
        return (text.replace(self._key, "[api key]") if self._key else text)[:400]


class _TransientError(Exception):
    """A failure that may pass."""

    def __init__(self, message: str, retry_after: float = 0.0, *, status: int = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status


class _TimedSocket:
    """A socket to read a reply from until a deadline: a timeout of the socket's would start anew with every byte."""

    def __init__(self, sock: socket, deadline: float) -> None:
        self._reader = _TimedReader(sock, deadline)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(self._reader)


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket, deadline: float) -> None:
        super().__init__()
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0.0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)


def _watch(sock: socket) -> None:
    """Have the system notice a machine that is gone without a word, which would otherwise take the whole deadline."""
    sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        from socket import TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL

        for option, value in zip((TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT), SECONDS_TO_MISS, strict=True):
            sock.setsockopt(IPPROTO_TCP, option, value)


def _left(deadline: float, url: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0.0:
        raise DeadlineError(f"{url}: no time is left for the request")
    return left


def _seconds(header: str | None) -> float:
    """Of a Retry-After header, at most a minute; 0 for one that is no plain number."""
    text = (header or "").strip()
    return min(float(text), 60.0) if text.isascii() and text.replace(".", "", 1).isdigit() else 0.0


def _times(n: int) -> str:
    return "one attempt" if n == 1 else f"{n} attempts"
