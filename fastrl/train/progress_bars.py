"""Reading and writing a model without transformers' progress bars, which would tear a panel and fill a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bar of transformers is drawn inside the `with` block; afterwards it is as it was."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Progress bars are off, and transformers says nothing of weights it did not find: the caller checks them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)
