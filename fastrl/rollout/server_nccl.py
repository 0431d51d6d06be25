"""Weights over NCCL: vLLM's own trainer engine broadcasts, its servers receive. Written against vLLM 0.32; not run.

The trainer is rank 0 of a group of its own; the workers of server i follow those of server i - 1. The engine talks to
one inference side, so `_Together` makes one of several servers: each message goes to all at the same time, because
every worker must enter the collective.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import nn

from fastrl.rollout.server_http import ServerError, ServerLostError
from fastrl.rollout.server_weights import Target, new_tag

BACKEND = "nccl"


class Nccl:
    """Broadcasts the parameters of the trainer's model, from its GPU to those of the servers.

    Nothing is copied: a server that is started again between two updates can be given the weights only while the
    trainer has not changed them.

    Args:
        host: address of this machine that the servers can reach.
    """

    def __init__(self, host: str) -> None:
        try:
            from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise ServerError(
                f"rollout.server.transfer: nccl needs a vLLM with WeightTransferTrainerFactory beside the trainer "
                f"({error}); install it, or use transfer: files"
            ) from None
        self._source, self._factory, self._info = ModuleSource, WeightTransferTrainerFactory, NCCLTrainerInitInfo
        self._host = host
        self._model: nn.Module | None = None
        self._changes = 0
        self.tag = ""
        self._engine: Any = None
        self._together = _Together((), tag=lambda: self.tag)
        self._members: tuple[Target, ...] = ()

    def take(self, model: nn.Module, version: int) -> None:
        if model is not self._model:
            self.close()
        self._model, self.tag, self._changes = model, new_tag(version), _changes(model)

    def send(self, targets: Sequence[Target]) -> dict[int, ServerError]:
        assert self._model is not None
        if _changes(self._model) != self._changes:
            error = ServerLostError("the trainer's weights have moved on; the server gets the next ones")
            return dict.fromkeys(range(len(targets)), error)
        try:
            if tuple(targets) != self._members or not all(target.is_joined for target in targets):
                self._join(targets)
            self._together.post("/pause?mode=abort")
            self._engine.send_weights()
            self._together.post("/resume")
        except ServerError as error:
            self.close()  # a broken member breaks the group for all
            return dict.fromkeys(range(len(targets)), error)
        return {}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        for target in self._members:
            target.is_joined = False
        self._engine, self._members = None, ()

    def _join(self, targets: Sequence[Target]) -> None:
        self.close()
        assert self._model is not None
        self._together = _Together(targets, tag=lambda: self.tag)
        with socket.socket() as sock:
            sock.bind((self._host, 0))
            port = int(sock.getsockname()[1])
        info = self._info(
            master_address=self._host, master_port=port, world_size=1 + sum(self._together.sizes), packed=True, rank=0
        )
        self._engine = self._factory.trainer_init(info, client=self._together, source=self._source(self._model))
        self._members = tuple(targets)
        for target in targets:
            target.is_joined = True


class _Together:
    """Several servers as the one that vLLM's trainer engine knows: its `VLLMWeightSyncClient`."""

    def __init__(self, targets: Sequence[Target], *, tag: Callable[[], str]) -> None:
        self._targets = targets
        self._tag = tag
        self.sizes = [target.world_size() for target in targets]

    def post(self, path: str, bodies: Sequence[Any] | None = None) -> None:
        """Send a message to all at once, to each its own body."""
        each = [None] * len(self._targets) if bodies is None else bodies
        with ThreadPoolExecutor(max(1, len(self._targets))) as pool:
            list(pool.map(lambda target, body: target.tell(path, body), self._targets, each))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset, bodies = int(init_info["rank_offset"]), []
        for size in self.sizes:
            bodies.append({"init_info": init_info | {"rank_offset": offset}})
            offset += size
        self.post("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("/update_weights", [{"update_info": update_info}] * len(self._targets))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self._tag() if weight_version is None else weight_version
        self.post("/finish_weight_update", [{"weight_version": version}] * len(self._targets))


def _changes(model: nn.Module) -> int:
    """A number that grows with every write to a parameter: torch counts them."""
    return sum(parameter._version for parameter in model.parameters())
