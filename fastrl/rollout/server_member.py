"""One vLLM server of a run: started by us, or running already; opened, lost, and opened again."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from fastrl.rollout.server_checks import Needs, check_server, warn_if_open
from fastrl.rollout.server_http import Client, ServerError
from fastrl.rollout.server_process import ServerProcess

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_ANSWER = 5.0


class Server:
    """Owner of one server's connection, and of its process where we started it.

    Args:
        source: the URL's client, or the process to start.
        retries: of requests to a process we start.
        seconds: for one message of a weight update.
        patience_seconds: how long a server that we did not start may be unreachable before it counts as lost.

    Attributes:
        is_up: whether it holds the current weights and may be given work.
        base, model, is_joined: see `fastrl.rollout.server_weights.Target`.
    """

    def __init__(
        self, source: Client | ServerProcess, *, retries: int, seconds: float, patience_seconds: float
    ) -> None:
        self._process = source if isinstance(source, ServerProcess) else None
        self._client = source if isinstance(source, Client) else None
        self.is_up, self.is_joined = False, False
        self.base = self.model = ""
        self._seconds = seconds
        self._retries = retries
        self._patience = patience_seconds
        self._has_warned = False

    @property
    def client(self) -> Client:
        if self._client is None:
            raise ServerError("the server has not been started")
        return self._client

    def open(self, needs: Needs, *, patience: bool) -> None:
        """Make it answer and check that it fits; it holds none of our weights afterwards.

        Args:
            patience: wait for a server that we did not start.

        Raises:
            ServerError: it does not come up, or does not fit.
        """
        self.is_up, self.is_joined = False, False
        if self._process is not None:
            self._client = self._process.start(retries=self._retries)
        elif patience:
            self._wait()
        self.base = self.model = check_server(self.client, needs)
        if self._process is None and not self._has_warned:
            self._has_warned = True
            warn_if_open(self.client)

    def tell(self, path: str, body: Any = None) -> None:
        """Send a message of a weight update, once."""
        self.client.tell(path, body, seconds=self._seconds)

    def ask(self, path: str, body: Any = None) -> Any:
        """The same, for what is answered in JSON."""
        return self.client.post(path, body, seconds=self._seconds)

    def world_size(self) -> int:
        """Workers of the server, all replicas together."""
        return int(self.client.get("/get_world_size", seconds=self._seconds)["world_size"])

    def holds(self, tag: str) -> bool:
        """Whether it names these weights as the ones it has; a vLLM too old to name any is believed."""
        try:
            found = self.client.get("/weight_info", seconds=SECONDS_TO_ANSWER)
        except ServerError as error:
            return error.status == 404
        return tag in ("", found.get("weight_version"))

    def close(self) -> None:
        """End the process if it is ours; leave another's running."""
        self.is_up = False
        if self._process is not None:
            self._process.stop()
        elif self.model != self.base:
            with suppress(ServerError):
                self.tell("/v1/unload_lora_adapter", {"lora_name": self.model})

    def _wait(self) -> None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            with suppress(ServerError):
                if self.client.status("/health", with_key=True, seconds=SECONDS_TO_ANSWER) == 200:
                    return
            time.sleep(SECONDS_BETWEEN_LOOKS)
