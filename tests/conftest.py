"""Fresh memory is NaN (or True) in tests, so that a kernel which forgets an element cannot pass by luck."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# What torch itself allocates (results of its operators, `out=` tensors that grow) it also writes.
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _spoiled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: object, **kwargs: object) -> torch.Tensor:
        fresh = make(*args, **kwargs)
        if fresh.is_floating_point():
            fresh.detach().fill_(float("nan"))  # detached: torch 2.11's checkpoint asks for a leaf
        elif fresh.dtype == torch.bool:
            fresh.fill_(True)
        return fresh

    return filled


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, _spoiled(getattr(owner, name)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside a developer's checkout; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("FASTRL_SHARED_DATA", SHARED_DATA))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set FASTRL_SHARED_DATA")
    return folder
