"""One request over HTTP: deadlines, retries where they help, errors that say what to do."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastrl.rollout import server_http
from fastrl.rollout.server_http import Client, DeadlineError, ServerError, ServerLostError
from tests.rollout.fake_server import (
    KEY,
    FakeServer,
    Fault,
    Handler,
    State,
    dropped,
    garbage,
    hung,
    status,
    trickled,
    truncated,
)

BODY = {"prompt": [5, 6], "max_tokens": 2, "seed": 0}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer(State())
    yield server
    server.shut()


def client_of(server: FakeServer, **options: float) -> Client:
    return Client(server.url, api_key=KEY, retries=int(options.get("retries", 3)), backoff=0.01)


def ask(client: Client, seconds: float = 10.0) -> list[int]:
    reply = client.call("POST", "/v1/completions", BODY, deadline=time.monotonic() + seconds)
    tokens: list[int] = reply["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize(
    "fault",
    [status(408), status(429), status(500), status(503), dropped, garbage, truncated],
    ids=["408", "429", "500", "503", "dropped", "garbage", "truncated"],
)
def test_what_may_pass_is_tried_again(server: FakeServer, fault: Fault) -> None:
    server.state.faults = [fault, fault]
    assert ask(client_of(server)) == [3, 4]
    assert server.state.calls["/v1/completions"] == 3


@pytest.mark.parametrize("code", [400, 403, 404, 409, 422, 302])
def test_what_will_not_pass_is_asked_once(server: FakeServer, code: int) -> None:
    server.state.faults = [status(code)]
    with pytest.raises(ServerError, match=f"status {code}: told to say {code}") as caught:
        ask(client_of(server))
    assert caught.value.status == code
    assert server.state.calls["/v1/completions"] == 1


def test_a_machine_that_is_gone_breaks_the_connection_before_the_deadline(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says ETIMEDOUT, which Python calls a TimeoutError as it does our own deadline."""
    read, calls = server_http._TimedReader.readinto, [0]

    def readinto(self: server_http._TimedReader, buffer: Any) -> int:
        assert self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        return read(self, buffer)

    monkeypatch.setattr(server_http._TimedReader, "readinto", readinto)
    assert ask(client_of(server)) == [3, 4]
    assert server.state.calls["/v1/completions"] == 2


def test_retries_end_and_say_how_often(server: FakeServer) -> None:
    server.state.faults = [status(500)] * 9
    with pytest.raises(ServerLostError, match="status 500: told to say 500, after 4 attempts"):
        ask(client_of(server))
    assert server.state.calls["/v1/completions"] == 4


def test_a_post_of_an_update_is_never_sent_twice(server: FakeServer) -> None:
    server.state.faults = [status(500)]
    with pytest.raises(ServerLostError, match="after one attempt"):
        client_of(server).post("/v1/completions", BODY, seconds=5.0)


def test_retry_after_is_honoured(server: FakeServer) -> None:
    server.state.faults = [status(429, Retry_After="0.4")]
    started = time.monotonic()
    ask(client_of(server))
    assert time.monotonic() - started >= 0.4


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(server: FakeServer) -> None:
    server.state.faults = [status(429, Retry_After="30")]
    started = time.monotonic()
    with pytest.raises(ServerLostError):
        ask(client_of(server), seconds=2.0)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("fault", [hung, trickled], ids=["hung", "trickled"])
def test_the_deadline_is_of_the_whole_reply(server: FakeServer, fault: Fault) -> None:
    """A byte now and then does not extend it."""
    server.state.faults = [fault]
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        ask(client_of(server), seconds=0.5)
    assert 0.4 < time.monotonic() - started < 1.5


def test_a_wrong_key_and_a_closed_port_are_named(server: FakeServer) -> None:
    with pytest.raises(ServerError, match=r"refuses the API key; rollout.server.api_key_env"):
        Client(server.url, api_key="wrong").get("/version", seconds=5.0)
    closed = FakeServer(State())
    closed.shut()
    with pytest.raises(ServerLostError, match="cannot connect"):
        Client(closed.url).get("/version", seconds=5.0)


def test_no_error_quotes_the_key(server: FakeServer) -> None:
    def quotes(handler: Handler) -> bool:
        handler.reply({"error": f"who is {KEY}?"}, 400)
        return True

    server.state.faults = [quotes]
    with pytest.raises(ServerError, match=r"who is \[api key\]\?") as caught:
        ask(client_of(server))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host?x=1", "http://user:pw@host:1"])
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"http://host:port|holds a user"):
        Client(url)
