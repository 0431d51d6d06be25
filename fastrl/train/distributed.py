"""Several processes that train one model as if they were one: what they tell each other, and how they part.

A process alone has no group, and every function here is then the identity. Each call is made by all ranks in the same
order. Sums are sums: weights are shares of the whole optimizer step, so nothing is ever divided by the number of ranks.
Values travel as JSON or as the bytes of tensors; nothing is pickled, as the sockets between ranks have no password.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.train.config import TrainConfig
from fastrl.train.device import pick_device
from fastrl.train.ranks import launched_ranks

T = TypeVar("T")
BUCKET_BYTES = 256 * 2**20  # one message: large enough for the network's full speed, small beside the gradients

MEETING_GRACE_SECONDS = 60.0  # torch's own limits end first where they hold, and say more

# Messages of rounds that are sampled ahead must not mix with those of the step that is trained meanwhile.
Lane = Literal["training", "sampling"]
_lanes: dict[Lane, Any] = {}


class RanksError(RuntimeError):
    """The ranks cannot go on together: one of them failed, is gone, or never came."""


def rank() -> int:
    """The number of this process among those that train together, from 0."""
    return dist.get_rank() if _lanes else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _lanes else 1


def is_first() -> bool:
    """Whether this process owns the run directory, the log, the report and the terminal."""
    return rank() == 0


@contextmanager
def joined(config: TrainConfig) -> Iterator[None]:
    """Meet the other ranks that the launcher started, and part together at the end; alone it does nothing.

    A GPU run speaks NCCL for tensors on the GPU and gloo for the rest; a CPU run gloo. After an error nobody waits:
    this rank's process ends, its connections close, and the launcher ends the others.

    Args:
        config: device (rank r of a machine takes its GPU r) and distributed are read.

    Raises:
        RanksError: fewer GPUs than ranks on this machine, the port is taken, or the others did not come.
    """
    place = launched_ranks()
    if place.size == 1:
        yield
        return
    is_cuda = pick_device(config.device).type == "cuda"
    if is_cuda and place.local_rank >= torch.cuda.device_count():
        raise RanksError(
            f"rank {place.rank} is number {place.local_rank} on this machine, which has {torch.cuda.device_count()} "
            "GPUs: start at most one process per GPU, or pass --device cpu"
        )
    if is_cuda:
        torch.cuda.set_device(place.local_rank)
    meeting_point = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = timedelta(seconds=config.distributed.timeout_seconds)
    stranger = f"rank {place.rank} found nobody of its run at {meeting_point}: another program may listen there"
    with (
        _waiting(f"the {place.size} ranks to meet at {meeting_point}", place.rank, place.size),
        _ended_after(config.distributed.timeout_seconds + MEETING_GRACE_SECONDS, stranger),
    ):
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", timeout=limit)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise RanksError(
                f"rank {place.rank} cannot wait for the others at {meeting_point}: another program uses the port. "
                "Choose another MASTER_PORT (torchrun --master_port), the same for all ranks"
            ) from error
        _lanes["training"] = dist.new_group(backend="gloo", timeout=limit)
        _lanes["sampling"] = dist.new_group(backend="gloo", timeout=limit)
    try:
        yield
        gather(None, "the end of the run")  # rank 0 may still be writing the model
        dist.destroy_process_group()
    finally:
        _lanes.clear()


def gather(value: Any, what: str, *, lane: Lane = "training") -> list[Any]:
    """What every rank has to say, in the order of ranks.

    Args:
        value: JSON; NaN and infinities are kept.
        what: the thing waited for, in words, for the error when somebody does not come.
    """
    if not _lanes:
        return [value]
    return [json.loads(data) for data in gather_bytes(json.dumps(value).encode(), what, lane=lane)]


def gather_bytes(data: bytes, what: str, *, lane: Lane = "training") -> list[bytes]:
    """The bytes of every rank, of any length, in the order of ranks."""
    if not _lanes:
        return [data]
    with _waiting(what, rank(), size()):
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=_lanes[lane])
        longest = max(1, *(int(length) for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
        found = [torch.zeros_like(padded) for _ in lengths]
        dist.all_gather(found, padded, group=_lanes[lane])
    return [each[: int(n)].numpy().tobytes() for each, n in zip(found, lengths, strict=True)]


def from_first(make: Callable[[], T], what: str, *, lane: Lane = "training") -> T:
    """Do something on rank 0 alone, such as reading or writing a file; every rank gets its result, or fails with it.

    Args:
        make: returns JSON.

    Raises:
        RanksError: on the other ranks, when it raised on rank 0.
    """
    if not _lanes:
        return make()
    told: dict[str, Any] = {}
    failure: BaseException | None = None
    if is_first():
        try:
            told = {"value": make()}
        except Exception as error:
            told, failure = {"error": str(error)}, error
    told = gather(told, what, lane=lane)[0]
    if failure is not None:
        raise failure
    if "error" in told:
        raise RanksError(f"rank 0 could not give {what}: {told['error']}")
    return told["value"]  # type: ignore[no-any-return]


def any_of(is_true: bool, what: str) -> bool:
    """Whether it is true on any rank; every rank gets the same answer."""
    return any(gather(is_true, what))


@torch.no_grad()
def add_up(tensors: Sequence[Tensor], what: str) -> None:
    """Replace each tensor by its sum over the ranks, in its own precision; all ranks get the same bits.

    Cost: each rank sends and receives 2 (n - 1) / n times the bytes of the tensors, and holds two buckets more.
    """
    if not _lanes:
        return
    sent: list[tuple[list[Tensor], Tensor, Any]] = []

    def take_back() -> None:
        bucket, flat, work = sent.pop(0)
        work.wait()
        torch._foreach_copy_(bucket, _parts(flat, bucket))

    with _waiting(what, rank(), size()):
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
            if len(sent) == 2:  # the next bucket is filled while this one travels
                take_back()
        while sent:
            take_back()


@torch.no_grad()
def spread(tensors: Sequence[Tensor], owner: int, what: str) -> None:
    """Overwrite the tensors of every rank with those of one of them."""
    if not _lanes:
        return
    with _waiting(what, rank(), size()):
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, src=owner)
            if rank() != owner:
                torch._foreach_copy_(bucket, _parts(flat, bucket))


def to_first(named: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Bring tensors that each rank has some of together on rank 0, in its main memory; others get an empty map."""
    if not _lanes:
        return dict(named)
    facts = gather({name: [_name_of(t.dtype), list(t.shape)] for name, t in named.items()}, what)
    found: dict[str, Tensor] = dict(named) if is_first() else {}
    with _waiting(what, rank(), size()):
        for source in range(1, size()):
            for name, (dtype, shape) in facts[source].items():
                if is_first():
                    found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                    dist.recv(found[name], src=source, group=_lanes["training"])
                elif rank() == source:
                    dist.send(named[name].detach().cpu().contiguous(), dst=0, group=_lanes["training"])
    return found


def told_tensors(named: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors that rank 0 has in its main memory, on every rank; what the others pass is not looked at."""
    if not _lanes:
        return dict(named)
    facts = gather({name: [_name_of(t.dtype), list(t.shape)] for name, t in named.items()}, what)[0]
    found = {}
    with _waiting(what, rank(), size()):
        for name, (dtype, shape) in facts.items():
            here = named[name].contiguous() if is_first() else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(here, src=0, group=_lanes["training"])
            found[name] = here
    return found


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, cut where the type or the device changes or a bucket is full."""
    bucket: list[Tensor] = []
    used = 0
    for tensor in tensors:
        is_other = bool(bucket) and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (is_other or used + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, used = [], 0
        bucket.append(tensor)
        used += tensor.nbytes
    if bucket:
        yield bucket


def _parts(flat: Tensor, bucket: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([tensor.numel() for tensor in bucket])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, bucket, strict=True)]


@contextmanager
def _ended_after(seconds: float, sentence: str) -> Iterator[None]:
    """End this process when the body takes longer: torch waits without limit for the reply of a program not its own."""

    def end() -> None:
        os.write(
            2, f"{sentence}. Choose another MASTER_PORT (torchrun --master_port), the same for all ranks\n".encode()
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _waiting(what: str, rank: int, size: int) -> Iterator[None]:
    """Say what was waited for when the others do not come, in time or at all."""
    try:
        yield
    except RanksError:
        raise
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RanksError(
            f"rank {rank} of {size} waited for {what}, and another rank did not come ({cause}). The cause is the first "
            "error of the others; when there is none, distributed.timeout_seconds may be too short for the slowest"
        ) from error
