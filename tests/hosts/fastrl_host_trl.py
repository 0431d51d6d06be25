"""pytest plugin: TRL runs on fastrl's waist from before its tests are collected until they are done."""

from __future__ import annotations

import pytest

from fastrl.integrations import trl


def pytest_configure(config: pytest.Config) -> None:
    """Patch."""
    trl.patch()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Unpatch."""
    trl.unpatch()
