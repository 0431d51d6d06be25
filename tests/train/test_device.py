from __future__ import annotations

import pytest
import torch

from fastrl.train.device import check_backend


def test_a_backend_that_cannot_run_on_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name in (None, "reference", "torch"):
        check_backend(name, cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="backend 'triton' of linear_token_loss needs a CUDA tensor"):
        check_backend("triton", cpu)
