from __future__ import annotations

import pytest
import torch

from fastrl.train.running_moments import RunningMoments


def test_batches_one_by_one_are_all_numbers_at_once() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3 + 100
    moments = RunningMoments()
    for part in values.split([1, 7, 0, 32]):
        moments.update(part)
    expected = (values.double() - values.double().mean()) / values.double().std()
    torch.testing.assert_close(moments.standardized(values).double(), expected, rtol=1e-5, atol=1e-5)
    assert moments.standardized(values).dtype == torch.float32


def test_one_number_has_no_deviation_and_is_left_alone() -> None:
    moments = RunningMoments()
    assert moments.standardized(torch.tensor([3.0])).tolist() == [3.0]
    moments.update(torch.tensor([3.0]))
    assert moments.standardized(torch.tensor([3.0])).tolist() == [3.0]
    moments.update(torch.tensor([5.0]))
    assert moments.standardized(torch.tensor([5.0])).tolist() == pytest.approx([1 / 2**0.5])


def test_state_comes_back_and_does_not_alias() -> None:
    moments, other = RunningMoments(), RunningMoments()
    moments.update(torch.tensor([1.0, 2.0, 4.0]))
    other.load_state_dict(moments.state_dict())
    moments.update(torch.tensor([100.0]))
    assert other.standardized(torch.tensor([4.0])).item() == pytest.approx((4 - 7 / 3) / (7 / 3) ** 0.5)
