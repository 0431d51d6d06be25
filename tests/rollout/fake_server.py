"""A small HTTP server that speaks as much of vLLM's protocol as the engine uses, and fails as it is told to.

Its tokens are a fixed function of the seed: 3, 4, ... with log-probability -0.5. It holds no model: the probe's answer
is what a test gives it. Only for faults; what vLLM really says is tested against vLLM, in tests/vllm.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "correct horse"
V = 40
Fault = Callable[["Handler"], bool]  # answers in its own way, or says False


@dataclass
class State:
    """What the server is and what happened to it."""

    version: str = "0.32.0"
    context: int | None = 48
    vocab_size: int = V
    is_guarded: bool = True
    processed: bool = True
    tokens: Callable[[str], list[int]] = lambda text: []
    probe: list[float] = field(default_factory=list)
    tag: str = "default"
    missing: tuple[str, ...] = ()
    faults: list[Fault] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    seeds: list[int] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer
    body: dict[str, Any]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one({})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.handle_one(json.loads(content) if content else {})

    def handle_one(self, body: dict[str, Any]) -> None:
        self.body = body
        state, path = self.server.state, self.path.partition("?")[0]
        with state.lock:
            state.calls[path] += 1
        if state.is_guarded and self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.reply({"error": "Unauthorized"}, 401)
        if path in state.missing:
            return self.reply({"detail": "Not Found"}, 404)
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/finish_weight_update":
            state.tag = body["weight_version"]
        replies: dict[str, Any] = {
            "/version": {"version": state.version},
            "/v1/models": {"data": [{"id": "policy", "parent": None, "max_model_len": state.context}]},
            "/weight_info": {"weight_version": state.tag},
            "/tokenize": {"tokens": state.tokens(body.get("prompt", ""))},
            "/reset_prefix_cache": {"success": True},
        }
        return self.reply(replies.get(path, {}), 200)

    def complete(self, body: dict[str, Any]) -> None:
        state, prompt = self.server.state, body["prompt"]
        if max(prompt) >= state.vocab_size:
            return self.reply({"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}, 400)
        if "prompt_logprobs" in body:
            entries = [{str(t): {"logprob": x}} for t, x in zip(prompt[1:], state.probe, strict=True)]
            return self.reply({"choices": [{"prompt_logprobs": [None, *entries]}]}, 200)
        if "seed" in body:  # a request of the engine's, not of its checks
            with state.lock:
                fault = state.faults.pop(0) if state.faults else None
            if fault is not None and fault(self):
                return None
            with state.lock:
                state.seeds.append(body["seed"])
                state.prompts.append(tuple(prompt))
        n = body["max_tokens"]
        logprob = 0.0 if body.get("top_k") == 1 and state.processed else -0.5
        ids = [3 + (body.get("seed", 0) + t) % (V - 3) for t in range(n)]
        choice = {
            "token_ids": ids,
            "logprobs": {"token_logprobs": [logprob] * n},
            "prompt_token_ids": prompt,
            "finish_reason": "length",
            "stop_reason": None,
        }
        return self.reply({"choices": [choice]}, 200)

    def reply(self, body: Any, status: int, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


class FakeServer(ThreadingHTTPServer):
    """Listens on a free port of the loopback interface until `shut`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, state: State, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.state = state
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error."""

    def shut(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


def status(code: int, **headers: str) -> Fault:
    def answer(handler: Handler) -> bool:
        handler.reply({"error": {"message": f"told to say {code}"}}, code, **headers)
        return True

    return answer


def dropped(handler: Handler) -> bool:
    """Close the connection without a word."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def garbage(handler: Handler) -> bool:
    content = b"<html>502</html>"
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
    return True


def truncated(handler: Handler) -> bool:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')
    handler.close_connection = True
    return True


def trickled(handler: Handler) -> bool:
    """One byte at a time, so that no single read takes long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    try:
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True
    return True


def hung(handler: Handler) -> bool:
    """Say nothing until the client leaves."""
    handler.connection.settimeout(20.0)
    with suppress(OSError):
        handler.connection.recv(1)
    handler.close_connection = True
    return True


def aborted(handler: Handler) -> bool:
    choice = {
        "token_ids": [3],
        "logprobs": {"token_logprobs": [-0.5]},
        "prompt_token_ids": handler.body["prompt"],
        "finish_reason": "abort",
    }
    handler.reply({"choices": [choice]}, 200)
    return True
