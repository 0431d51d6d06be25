"""A model's weights in memory that two processes map: one writes them, the other reads them, nothing is sent.

The structure of the model travels once, pickled with every tensor replaced by its place in the shared memory.
"""

from __future__ import annotations

import copy
import io
import mmap
import os
import pickle
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes: a vector register, and more than any element


@dataclass(frozen=True, slots=True)
class SharedModel:
    """A module on the CPU whose parameters and buffers lie in shared memory.

    Attributes:
        module: reads and writes the shared memory.
        structure: what `read_shared` needs beside the descriptor.
        descriptor: of the memory; give it to a child process, and close it when no further child will start.
    """

    module: nn.Module
    structure: bytes
    descriptor: int


def share(model: nn.Module) -> SharedModel:
    """A copy of `model` in new shared memory, without gradients.

    Raises:
        ValueError: a tensor that is not a plain dense one, such as a 4-bit weight.
    """
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise ValueError(
                f"{name} is a {type(tensor).__name__}, which another process cannot map; an engine in a process of "
                "its own needs plain weights (load_in_4bit makes others)"
            )
    size = sum(_padded(tensor.numel() * tensor.element_size()) for tensor in tensors.values())
    descriptor = _anonymous_file(max(size, ALIGNMENT))
    memory = _mapped(descriptor)
    places: dict[int, tuple[int, Tensor]] = {}  # id of a tensor of the model -> offset, its twin
    memo: dict[int, Any] = {}
    offset = 0
    for tensor in tensors.values():
        if id(tensor) in places:
            continue  # tied
        twin = _view(memory, offset, tensor.dtype, tensor.shape)
        twin.copy_(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=False)
        places[id(tensor)] = (offset, twin)
        memo[id(tensor)] = twin
        offset += _padded(twin.numel() * twin.element_size())
    module = copy.deepcopy(model, memo)
    offsets = {id(twin): start for start, twin in places.values()}
    buffer = io.BytesIO()
    _Pickler(buffer, offsets).dump(module)
    return SharedModel(module, buffer.getvalue(), descriptor)


def read_shared(structure: bytes, descriptor: int) -> nn.Module:
    """The module of `share`, in another process: its tensors are the same memory."""
    module = _Unpickler(io.BytesIO(structure), _mapped(descriptor)).load()
    assert isinstance(module, nn.Module)
    return module


class _Pickler(pickle.Pickler):
    """Writes a shared tensor as its place."""

    def __init__(self, file: io.BytesIO, offsets: dict[int, int]) -> None:
        super().__init__(file)
        self._offsets = offsets

    def persistent_id(self, obj: Any) -> tuple[int, bool, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(obj, Tensor) or id(obj) not in self._offsets:
            return None
        return self._offsets[id(obj)], isinstance(obj, nn.Parameter), obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: Tensor) -> None:
        super().__init__(file)
        self._memory = memory
        self._found: dict[int, Tensor] = {}

    def persistent_load(self, place: tuple[int, bool, torch.dtype, tuple[int, ...]]) -> Tensor:
        offset, is_parameter, dtype, shape = place
        if offset not in self._found:  # a tied tensor stays one
            tensor = _view(self._memory, offset, dtype, shape)
            self._found[offset] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self._found[offset]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has, buffers that no checkpoint holds included."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _view(memory: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    n = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + n].view(dtype).view(shape)


def _padded(n: int) -> int:
    # An empty tensor takes a place too, so that places tell tensors apart.
    return max(ALIGNMENT, -(-n // ALIGNMENT) * ALIGNMENT)


def _mapped(descriptor: int) -> Tensor:
    """[size] uint8 over the whole file."""
    return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)


def _anonymous_file(size: int) -> int:
    """Descriptor of memory without a name, gone with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fastrl-weights")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
