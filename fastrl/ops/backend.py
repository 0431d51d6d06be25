"""One rule that picks an implementation: the call's `backend=`, else `use_backend(...)`, else the machine's best.

The machine's best is triton on CUDA where the op has a kernel, native on CPU where `fastrl._C` was built with the
op, and torch everywhere else. A backend that was asked for and cannot run raises; nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "native", "triton")

_asked: ContextVar[str | None] = ContextVar("fastrl_backend", default=None)


@dataclass(frozen=True, slots=True)
class Implementations:
    """Where the implementations of one op live; every op has `reference` and `torch`.

    Attributes:
        op: the op's name in messages.
        triton: module with its Triton kernels (`fastrl.kernels.reverse_scan`), imported when first chosen.
        native: operator `fastrl._C` registers with torch.library for it (`fastrl::reverse_scan`).
    """

    op: str
    triton: str | None = None
    native: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op called inside the `with` block uses backend `name`, unless its own `backend=` says otherwise.

    The choice follows the context (thread or task) that made it. Backward uses what its forward used.

    Args:
        name: "reference", "torch", "native" or "triton".

    Raises:
        ValueError: unknown name. The op raises RuntimeError when it cannot run there.
    """
    token = _asked.set(_known(name))
    try:
        yield
    finally:
        _asked.reset(token)


def choose(backend: str | None, tensor: Tensor, implementations: Implementations) -> str:
    """Name of the backend that runs this call.

    Args:
        backend: what the caller of the op asked for, or None.
        tensor: an argument that tells the device.
        implementations: what the op has.

    Returns:
        "reference", "torch", "native" or "triton"; the module or operator behind it is importable.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend was asked for and cannot run here; the message names what is missing.
    """
    asked = _asked.get() if backend is None else _known(backend)
    if asked is not None:
        missing = _missing(asked, tensor, implementations)
        if missing is not None:
            raise RuntimeError(f"backend {asked!r} of {implementations.op} {missing}")
        return asked
    if tensor.is_cuda and _missing("triton", tensor, implementations) is None:
        return "triton"
    if tensor.device.type == "cpu" and _missing("native", tensor, implementations) is None:
        return "native"
    return "torch"


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _missing(name: str, tensor: Tensor, implementations: Implementations) -> str | None:
    """Why `name` cannot run on `tensor`'s device, as the end of a sentence; None when it can."""
    if name == "triton":
        return _missing_triton(tensor, implementations)
    if name == "native":
        return _missing_native(tensor, implementations)
    return None


def _missing_triton(tensor: Tensor, implementations: Implementations) -> str | None:
    if implementations.triton is None:
        return "does not exist: the op has no Triton kernel yet; use backend='torch'"
    if find_spec("triton") is None:
        return "needs the module 'triton', which is not installed"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA tensor, got one on {tensor.device.type} (TRITON_INTERPRET=1 interprets kernels on CPU)"
    return None


def _missing_native(tensor: Tensor, implementations: Implementations) -> str | None:
    if implementations.native is None:
        return "does not exist: the op has no native implementation; use backend='torch'"
    if not _extension_is_loaded():
        return "needs the compiled extension 'fastrl._C': install fastrl with a C++ compiler and torch present"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(tensor.device.type)
    known = {schema.name for schema in torch._C._jit_get_schemas_for_operator(implementations.native)}
    if implementations.native not in known:
        return f"needs the operator {implementations.native!r}, which this build of fastrl._C lacks; rebuild it"
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(implementations.native, key):
        return f"was not built for {tensor.device.type} tensors"
    return None


@cache
def _extension_is_loaded() -> bool:
    """Load `fastrl._C` when it was built; loading registers its operators with torch.library."""
    if find_spec("fastrl._C") is None:
        return False
    import_module("fastrl._C")
    return True
