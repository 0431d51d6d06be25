"""pytest plugin: prime-rl's output layer becomes ours before its test imports it.

The test imports the trainer's package for a few pure functions, and that imports CUDA attention and server settings.
Here the package is its folder alone, and what the tested functions do not need has a stand-in without content.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastrl.integrations.prime_rl import FusedOutputLinear


class StandIn(ModuleType):
    """A module whose every public name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def pytest_configure(config: pytest.Config) -> None:
    """Swap before collection."""
    config.addinivalue_line("markers", "gpu: needs a GPU")
    package = find_spec("prime_rl.trainer")
    assert package is not None
    assert package.submodule_search_locations is not None
    models = StandIn("prime_rl.trainer.models")
    models.__path__ = [str(Path(place) / "models") for place in package.submodule_search_locations]
    sys.modules[models.__name__] = models
    for name in ("prime_rl.configs", "prime_rl.configs.trainer", "prime_rl.trainer.models.llama"):
        sys.modules[name] = StandIn(name)
    head = importlib.import_module("prime_rl.trainer.models.layers.lm_head")
    models.cast_float_and_contiguous = head.cast_float_and_contiguous  # type: ignore[attr-defined]
    head.FusedOutputLinear = FusedOutputLinear


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say why a case cannot run."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
