"""A real HTTP server on loopback that behaves as an OpenAI-compatible endpoint does on good and on bad days."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NONCE = re.compile(r"<data-([0-9a-f]+)>")


@dataclass
class Reply:
    """What the server sends: a status and a body, after a while, perhaps cut short."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    is_cut: bool = False


Behaviour = Callable[[dict[str, Any]], Reply]  # the request's body -> reply


@dataclass
class Served:
    """A running server: its address and what it was asked."""

    base_url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0


def nonce_of(request: dict[str, Any]) -> str:
    """The number of the question's frame, as the judge reads it in its instruction."""
    found = NONCE.search(request["messages"][0]["content"])
    assert found is not None
    return found[1]


def answers_of(request: dict[str, Any]) -> list[str]:
    """What stands in the frames of the question, in order."""
    nonce = nonce_of(request)
    pattern = re.compile(rf"<data-{nonce}>\n(.*?)\n</data-{nonce}>", re.DOTALL)
    return pattern.findall(request["messages"][1]["content"])


def says(text: str, *, used: tuple[int, int] | None = (10, 5), **options: Any) -> Reply:
    """A well-formed body with this text as the reply."""
    body: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    body["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
    if used is not None:
        body["usage"] = {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)}
    return Reply(json.dumps(body).encode(), **options)


def verdict(request: dict[str, Any], **fields: Any) -> Reply:
    """A verdict with the question's own nonce."""
    return says(json.dumps({"nonce": nonce_of(request), "reason": "because", **fields}))


def by_length(request: dict[str, Any]) -> Reply:
    """A judge that scores an answer by its length, at most 10."""
    return verdict(request, scores={"score": min(10, len(answers_of(request)[-1]))})


@contextmanager
def serving(*behaviours: Behaviour) -> Iterator[Served]:
    """Serve the behaviours one after the other, the last for ever."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(served.requests)
                served.requests.append(request)
                served.keys.append(self.headers.get("authorization"))
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            try:
                reply = behaviours[min(number, len(behaviours) - 1)](request)
                time.sleep(reply.seconds)
                self._send(reply)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    served.at_once -= 1

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in ({"content-type": "application/json"} | reply.headers).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body[: len(reply.body) // 2] if reply.is_cut else reply.body)
            if reply.is_cut:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # five, the default, loses connections of a concurrent client on a busy machine

    server = Server(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
