"""Where a run computes."""

from __future__ import annotations

import pytest
import torch

from fastrl.train.device import compute_dtype, peak_gib, pick_device


def test_auto_takes_a_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_there, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_there: found)
        assert pick_device("auto") == torch.device(name)
        assert pick_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="pass --device cpu"):
        pick_device("cuda")


def test_precisions_have_their_names() -> None:
    assert compute_dtype("float32") is torch.float32
    assert compute_dtype("bfloat16") is torch.bfloat16


def test_the_most_memory_is_in_gib_and_never_shrinks() -> None:
    device = torch.device("cpu")
    before = peak_gib(device)
    torch.ones(2**22).sum()
    assert 0.05 < before <= peak_gib(device) < 1000
