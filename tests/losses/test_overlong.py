from __future__ import annotations

import pytest
import torch

from fastrl.losses.overlong import soft_overlong


def test_the_punishment_is_zero_then_linear_then_flat() -> None:
    length = torch.tensor([1, 80, 85, 90, 100, 130])
    assert soft_overlong(length, limit=100, buffer=20).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])


def test_the_penalty_is_in_units_of_reward() -> None:
    assert soft_overlong(torch.tensor([100]), limit=100, buffer=20, penalty=0.4).tolist() == pytest.approx([-0.4])


@pytest.mark.parametrize("buffer", [0, 101])
def test_a_buffer_that_does_not_fit_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="buffer"):
        soft_overlong(torch.tensor([5]), limit=100, buffer=buffer)
