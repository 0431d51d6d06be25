"""Open files that a test forgets are warnings, and warnings are errors: `opened` closes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    """Returns its argument and closes it after the test."""
    with ExitStack() as stack:
        yield lambda resource: stack.enter_context(closing(resource))
