from __future__ import annotations

import numpy as np
import pytest
import torch

from fastrl.losses.entropy import entropy_keep


def test_the_highest_fifth_keeps_its_gradient() -> None:
    entropy = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 9.0])
    trained = torch.tensor([True] * 5 + [False])
    assert entropy_keep(entropy, trained, 0.2).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.999])
@pytest.mark.parametrize("n", [1, 2, 11, 101])
def test_the_set_is_trls_interpolated_quantile(quantile: float, n: int) -> None:
    entropy = np.random.default_rng(n).permutation(n).astype(np.float64)
    got = entropy_keep(torch.tensor(entropy), torch.ones(n).bool(), quantile)
    # entropies are whole numbers here: the slack only absorbs the rounding of the interpolation
    assert got.tolist() == (entropy >= np.quantile(entropy, 1 - quantile) - 1e-9).tolist()


def test_ties_with_the_threshold_are_kept() -> None:
    assert entropy_keep(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.ones(4).bool(), 0.25).tolist() == [True] * 3 + [False]


def test_everything_is_kept_at_one_and_nothing_untrained_ever() -> None:
    trained = torch.tensor([True, False, True])
    assert entropy_keep(torch.tensor([0.0, 5.0, 1.0]), trained, 1.0).tolist() == [True, False, True]
    assert entropy_keep(torch.zeros(3), torch.zeros(3).bool(), 0.5).tolist() == [False] * 3


@pytest.mark.parametrize("quantile", [0.0, -0.2, 1.5])
def test_a_share_outside_zero_to_one_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match="share"):
        entropy_keep(torch.zeros(3), torch.ones(3).bool(), quantile)
