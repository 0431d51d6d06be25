"""Fresh memory is NaN in tests, so that a kernel which forgets to write an element cannot pass by luck."""

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


def _nan_filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: object, **kwargs: object) -> torch.Tensor:
        fresh = make(*args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    return filled


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", _nan_filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _nan_filled(torch.empty_like))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside a developer's checkout; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("FASTRL_SHARED_DATA", SHARED_DATA))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set FASTRL_SHARED_DATA")
    return folder
