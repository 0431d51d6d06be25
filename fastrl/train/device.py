"""Where a run computes, in which precision, and what it used."""

from __future__ import annotations

import resource
import sys
from typing import Literal

import torch

from fastrl.ops.backend import Implementations, choose

GIB = 2**30


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device to train on.

    Raises:
        RuntimeError: "cuda" on a machine where torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: cuda, but torch sees no GPU; install a CUDA build of torch or pass --device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def check_backend(name: str | None, device: torch.device) -> None:
    """Refuse a backend that cannot run on the device, before anything is loaded.

    Raises:
        RuntimeError: naming what is missing.
    """
    if name is not None:
        waist = Implementations("linear_token_loss", triton="fastrl.kernels.token_stats")
        choose(name, torch.empty(0, device=device), waist)


def compute_dtype(name: Literal["float32", "bfloat16"]) -> torch.dtype:
    """Return torch's dtype of that name."""
    return torch.float32 if name == "float32" else torch.bfloat16


def peak_gib(device: torch.device) -> float:
    """Return the most memory in use so far: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # bytes on macOS, KiB on Linux
