"""What tests/conftest.py promises: no test reads memory that nobody wrote and passes by luck."""

from __future__ import annotations

import pytest
import torch

LIKE = torch.zeros(3)
FRESH = {
    "empty": lambda **kwargs: torch.empty(2, 3, **kwargs),
    "empty, size by name": lambda **kwargs: torch.empty(size=(2, 3), **kwargs),
    "empty_like": lambda **kwargs: torch.empty_like(LIKE, **kwargs),
    "empty_strided": lambda **kwargs: torch.empty_strided((2, 3), (3, 1), **kwargs),
    "new_empty": lambda **kwargs: LIKE.new_empty((2, 3), **kwargs),
    "new_empty_strided": lambda **kwargs: LIKE.new_empty_strided((2, 3), (3, 1), **kwargs),
}


@pytest.mark.parametrize("name", FRESH)
def test_fresh_memory_is_nan_or_true(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert FRESH[name](dtype=dtype).isnan().all()
    assert FRESH[name](dtype=torch.bool).all()


def test_memory_that_an_operator_of_ours_allocates_is_nan_too():
    # In this mode torch fills what C++ allocates as well; tests/ops/test_properties.py runs in it.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.ops.aten.empty.memory_format([5]).isnan().all()
        assert torch.zeros(1).resize_(9)[1:].isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
