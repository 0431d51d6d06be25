"""The key is asked for on every route, in every method, and two keys are no key."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from fastrl.rollout.server_guard import BearerOnEveryRoute, is_loopback

GOOD = (b"authorization", b"Bearer sesame")


def answer(headers: list[tuple[bytes, bytes]], kind: str = "http", path: str = "/update_weights") -> Any:
    """What a request gets: "in" when the guard lets it through, else what it sends."""
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"type": "in"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {}

    guard = BearerOnEveryRoute(app)
    asyncio.run(guard({"type": kind, "path": path, "method": "OPTIONS", "headers": headers}, receive, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")


@pytest.mark.parametrize("path", ["/update_weights", "/v1/models", "/health", "/", "/pause"])
def test_the_right_key_opens_and_nothing_else_does(path: str) -> None:
    assert answer([GOOD], path=path) == "in"
    for bad in (
        [],
        [(b"authorization", b"Bearer sesam")],
        [(b"authorization", b"sesame")],
        [(b"authorization", b"bearer sesame")],
        [(b"authorization", b"Bearer ")],
        [GOOD, (b"authorization", b"Bearer other")],
        [(b"x-api-key", b"sesame")],
    ):
        assert answer(bad, path=path) == 401


def test_web_sockets_are_closed_and_the_lifespan_passes() -> None:
    assert answer([], kind="websocket") == "websocket.close"
    assert answer([GOOD], kind="websocket") == "in"
    assert answer([], kind="lifespan") == "in"


def test_a_guard_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(ValueError, match="VLLM_API_KEY"):
        answer([])


def test_loopback_is_this_machine_alone() -> None:
    assert [host for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost") if not is_loopback(host)] == []
    assert [host for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "") if is_loopback(host)] == []
