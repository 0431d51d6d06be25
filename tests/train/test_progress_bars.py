"""transformers' bars are off while a model is read or written, and on again afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.utils import logging

from fastrl.train.progress_bars import without_progress_bars


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("was_on", [True, False])
def test_bars_are_off_inside_and_as_they_were_afterwards(was_on: bool) -> None:
    logging.enable_progress_bar() if was_on else logging.disable_progress_bar()
    with without_progress_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == was_on


def test_an_error_does_not_leave_them_off() -> None:
    logging.enable_progress_bar()
    with pytest.raises(KeyError), without_progress_bars():
        raise KeyError
    assert logging.is_progress_bar_enabled()
