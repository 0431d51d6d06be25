from __future__ import annotations

from typing import Literal

import pytest
import torch
from transformers import get_scheduler

from fastrl.train.schedule import learning_rate_at, warmup_length


def rates(kind: Literal["constant", "linear", "cosine"], *, warmup: int = 2, total: int = 6) -> list[float]:
    return [learning_rate_at(s, peak=8.0, kind=kind, warmup_steps=warmup, total_steps=total) for s in range(total + 1)]


def test_the_numbers_of_each_schedule() -> None:
    assert rates("constant") == [0.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    assert rates("linear") == [0.0, 4.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    assert rates("cosine") == pytest.approx([0.0, 4.0, 8.0, 6.828427, 4.0, 1.171573, 0.0])


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates("linear", warmup=0, total=4) == [8.0, 6.0, 4.0, 2.0, 0.0]


def test_a_run_that_is_all_warm_up_ends_at_the_peak_of_its_line() -> None:
    assert rates("constant", warmup=6, total=6)[-2:] == [8.0 * 5 / 6, 8.0]


@pytest.mark.parametrize(("kind", "theirs"), [("constant", "constant_with_warmup"), ("linear",) * 2, ("cosine",) * 2])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_numbers_are_those_of_transformers(kind: str, theirs: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=8.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(kind, warmup=warmup, total=10)[:10] == pytest.approx(expected)  # type: ignore[arg-type]


def test_warm_up_is_a_number_of_steps_or_a_share_rounded_up() -> None:
    assert warmup_length(100, warmup_steps=7, warmup_ratio=0.5) == 7
    assert warmup_length(101, warmup_steps=0, warmup_ratio=0.03) == 4
    assert warmup_length(101, warmup_steps=0, warmup_ratio=0.0) == 0


def test_an_unknown_kind_or_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        learning_rate_at(5, peak=1.0, kind="sqrt", warmup_steps=0, total_steps=9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step=-1"):
        learning_rate_at(-1, peak=1.0, kind="linear", warmup_steps=0, total_steps=9)
