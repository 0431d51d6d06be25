"""A bearer token on every route of a vLLM server.

vLLM's own `--api-key` covers the paths under /v1, /v2, /inference and /cohere. `/update_weights`, `/pause`, `/sleep`,
`/collective_rpc`, `/invocations` and the rest answer whoever asks. This class covers them all:

    VLLM_API_KEY=... vllm serve MODEL --middleware fastrl.rollout.server_guard.BearerOnEveryRoute

It imports nothing of vLLM and nothing outside the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

API_KEY_VARIABLE = "VLLM_API_KEY"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class BearerOnEveryRoute:
    """ASGI middleware: 401 unless the request carries `Authorization: Bearer $VLLM_API_KEY`, compared in constant time.

    Every HTTP request and web socket is checked, whatever its path and method; other scopes (lifespan) pass. `/health`
    is not an exception: what may be restarted by a health check should not be visible to strangers either.

    Raises:
        ValueError: VLLM_API_KEY is not set; a guard that lets everyone in would be worse than none.
    """

    def __init__(self, app: Application) -> None:
        key = os.environ.get(API_KEY_VARIABLE, "")
        if not key:
            raise ValueError(f"BearerOnEveryRoute needs the key in the environment variable {API_KEY_VARIABLE}")
        self._app = app
        self._expected = _digest(f"Bearer {key}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b'{"error": "missing or wrong API key"}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _is_known(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        # Two headers could be read differently by two readers.
        return len(given) == 1 and hmac.compare_digest(_digest(given[0]), self._expected)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own and nobody else's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(text: bytes) -> bytes:
    # Digests have one length, so that the comparison tells nothing of the key's.
    return hashlib.sha256(text).digest()
