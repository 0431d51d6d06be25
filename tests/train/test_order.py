"""The order of rows is a function of seed and ordinal."""

from __future__ import annotations

import torch

from fastrl.train.order import epoch_order, row_at


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    visited = [[row_at(epoch * 50 + i, n=50, seed=7) for i in range(50)] for epoch in range(3)]
    assert all(sorted(rows) == list(range(50)) for rows in visited)
    assert len({tuple(rows) for rows in visited}) == 3
    assert tuple(visited[1]) == epoch_order(50, 7, 1)


def test_the_seed_decides_the_order_and_the_global_generator_has_no_say() -> None:
    first = epoch_order(50, 7, 0)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    epoch_order.cache_clear()
    assert epoch_order(50, 7, 0) == first
    assert epoch_order(50, 8, 0) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_seeds_and_epochs_do_not_share_an_order() -> None:
    orders = {epoch_order(20, seed, epoch) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
