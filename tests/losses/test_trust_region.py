from __future__ import annotations

import math

import pytest
import torch

from fastrl.losses.trust_region import binary_kl, binary_tv
from tests import oracle

# (probability now, probability before)
MOVES = [(0.5, 0.5), (0.9, 0.5), (0.1, 0.5), (0.02, 0.0001), (0.69, 0.5), (0.31, 0.5), (0.999, 0.7)]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("ours", "theirs"), [(binary_tv, oracle.inside_tv), (binary_kl, oracle.inside_kl)])
def test_the_mask_is_the_papers(ours, theirs, advantage: float) -> None:  # type: ignore[no-untyped-def]
    now = torch.tensor([math.log(p) for p, _ in MOVES], dtype=torch.float64)
    old = torch.tensor([math.log(q) for _, q in MOVES], dtype=torch.float64)
    got = ours(now, old, torch.full_like(now, advantage), low=0.2, high=0.25)
    assert got.tolist() == [theirs(math.log(p), math.log(q), advantage, 0.2, 0.25) for p, q in MOVES]


def test_a_rare_token_may_change_its_ratio_where_a_likely_one_may_not_move() -> None:
    now, old = torch.tensor([0.02, 0.9]).log(), torch.tensor([0.0001, 0.5]).log()  # ratios 200 and 1.8
    assert binary_tv(now, old, torch.ones(2)).tolist() == [1, 0]


def test_moving_against_the_advantage_is_never_blocked() -> None:
    now, old = torch.tensor([0.1, 0.9]).log(), torch.tensor([0.9, 0.1]).log()
    for region in (binary_tv, binary_kl):
        assert region(now, old, torch.tensor([1.0, -1.0])).tolist() == [1, 1]
