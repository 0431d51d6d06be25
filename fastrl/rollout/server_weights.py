"""Ways to bring the trainer's weights to vLLM servers: files, NCCL, or a LoRA adapter.

    /pause -> /start_weight_update -> /update_weights -> /finish_weight_update -> /resume      files and NCCL
    /v1/load_lora_adapter                                                                     adapters

All are vLLM's own endpoints. No pickle travels: files are safetensors, messages are JSON.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import nn

from fastrl.rollout.server_http import ServerError
from fastrl.rollout.vllm_weights import WriteAdapter, named_weights

FILE_BYTES = 1 << 32  # one file at most, or one tensor
NO_FILE = "."  # a name that no file has


class Target(Protocol):
    """A server as a transport sees it.

    Attributes:
        base: the name it serves its model under.
        model: the name that requests use now: `base`, or an adapter's.
        is_joined: whether it has been told where weights come from.
    """

    base: str
    model: str
    is_joined: bool

    def tell(self, path: str, body: Any = None) -> None:
        """Send a message of a weight update, once."""
        ...

    def world_size(self) -> int:
        """Workers of the server, all replicas together."""
        ...


class Transport(Protocol):
    """Takes weights from the trainer, then brings them to any number of servers, any number of times.

    Attributes:
        tag: what `/weight_info` says on a server that has the weights taken last; "" when it says nothing of them.
    """

    @property
    def tag(self) -> str: ...

    def take(self, model: nn.Module, version: int) -> None:
        """Keep what `send` needs of `model`, which stays as it is until the next `take`."""
        ...

    def send(self, targets: Sequence[Target]) -> dict[int, ServerError]:
        """Bring what was taken to the servers; those that failed, by their place."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class Files:
    """Safetensors files in a private directory that the servers can read: the same machine, or a network disk.

    What was taken stays there, so that a server which is started again later gets just these weights, although the
    trainer's have moved on.

    Args:
        directory: where to make the private directory; None is the system's place for temporary files.
    """

    def __init__(self, directory: str | None = None) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="fastrl-weights-", dir=directory))  # readable by us alone
        self._names: list[str] = []
        self.tag = ""

    def take(self, model: nn.Module, version: int) -> None:
        for name in self._names:
            (self._directory / name).unlink(missing_ok=True)
        self._names, self.tag = [], new_tag(version)
        shard: dict[str, Any] = {}
        size = 0
        seen: set[int] = set()
        own = {name for name, _ in model.named_parameters()}
        for name, tensor in sorted(named_weights(model).items(), key=lambda item: item[0] not in own):
            if tensor.data_ptr() in seen:  # tied to one before; the server ties them too, under that name
                continue
            seen.add(tensor.data_ptr())
            n_bytes = tensor.numel() * tensor.element_size()
            if shard and size + n_bytes > FILE_BYTES:
                self._write(shard)
                shard, size = {}, 0
            shard[name] = tensor.cpu().contiguous()
            size += n_bytes
        self._write(shard)

    def send(self, targets: Sequence[Target]) -> dict[int, ServerError]:
        return _each(self._sent, targets)

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _write(self, shard: dict[str, Any]) -> None:
        self._names.append(f"{self.tag}-{len(self._names)}.safetensors")
        save_file(shard, self._directory / self._names[-1], metadata={"format": "pt"})

    def _sent(self, target: Target) -> None:
        if not target.is_joined:
            target.tell("/init_weight_transfer_engine", {"init_info": {"directory": str(self._directory)}})
            target.is_joined = True
        target.tell("/pause?mode=abort")
        try:
            target.tell("/start_weight_update")
        except ServerError as error:
            if error.status < 500:
                raise
            # An update that was cut off before its end is still open; in vLLM one that fails is closed.
            with suppress(ServerError):
                target.tell("/update_weights", {"update_info": {"files": [NO_FILE]}})
            target.tell("/start_weight_update")
        target.tell("/update_weights", {"update_info": {"files": self._names}})
        target.tell("/finish_weight_update", {"weight_version": self.tag})
        target.tell("/resume")


class Adapters:
    """LoRA adapters as peft writes them, each version under a name of its own, over the base that the servers loaded.

    Args:
        write: writes the adapter of a model into a directory that does not exist yet.
        directory: as for `Files`.
    """

    def __init__(self, write: WriteAdapter, directory: str | None = None) -> None:
        self._write = write
        self._directory = Path(tempfile.mkdtemp(prefix="fastrl-adapters-", dir=directory))
        self._path = self._directory
        self.tag = ""  # an adapter has its tag for a name, and requests give it

    def take(self, model: nn.Module, version: int) -> None:
        if self._path != self._directory:
            shutil.rmtree(self._path, ignore_errors=True)
        self._path = self._directory / new_tag(version)
        self._write(model, self._path)

    def send(self, targets: Sequence[Target]) -> dict[int, ServerError]:
        return _each(self._sent, targets)

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _sent(self, target: Target) -> None:
        name, old = self._path.name, target.model
        if old == name:  # sent before, but not probed
            with suppress(ServerError):
                target.tell("/v1/unload_lora_adapter", {"lora_name": name})
        target.tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._path)})
        target.model = name
        if old not in (target.base, name):
            with suppress(ServerError):  # a server that was started again does not know it
                target.tell("/v1/unload_lora_adapter", {"lora_name": old})


def new_tag(version: int) -> str:
    """A name that no other update has: versions repeat (a run that goes back, a second run on the same server)."""
    return f"policy-{version}-{secrets.token_hex(4)}"


def _each(send: Callable[[Target], None], targets: Sequence[Target]) -> dict[int, ServerError]:
    """Send to all servers at once; the errors of those that failed, by their place."""
    if not targets:
        return {}
    with ThreadPoolExecutor(len(targets)) as pool:
        futures = [pool.submit(send, target) for target in targets]
    failed: dict[int, ServerError] = {}
    for i, future in enumerate(futures):
        error = future.exception()
        if isinstance(error, ServerError):
            failed[i] = error
        elif error is not None:
            raise error
    return failed
