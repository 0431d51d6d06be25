"""Tests on a machine with torch, triton, numpy and pytest alone: what they do without, and how they reach a GPU."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent
NEEDS_NOTHING_ELSE = ("kernels", "ops", "test_native.py", "test_testing.py", "test_bare_checkout.py")


def _release(distribution: str) -> tuple[int, ...]:
    """Major and minor version; a distribution that is not installed is newer than any."""
    try:
        return tuple(int(x) for x in version(distribution).split(".")[:2])
    except PackageNotFoundError:
        return (sys.maxsize,)


collect_ignore: list[str] = []
if find_spec("transformers") is None:
    collect_ignore += [str(x) for x in (ROOT / "tests").iterdir() if x.is_dir() or x.name.startswith("test_")]
    collect_ignore = [x for x in collect_ignore if Path(x).name not in NEEDS_NOTHING_ELSE]
# Triton 3.6 makes an int of an array of one element, which NumPy 2.4 refuses.
COUNTS_WITH_ARRAYS = _release("triton") < (3, 7) and _release("numpy") >= (2, 4)
if COUNTS_WITH_ARRAYS:
    collect_ignore.append(str(ROOT / "tests/ops/test_vocab_parallel.py"))  # its processes are out of reach from here


class _Anything:
    """Stands for a strategy: whatever is asked of it gives another."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self


class _NoHypothesis(ModuleType):
    """Stands for hypothesis: its strategies are anything, and a test under one of its decorators is skipped."""

    strategies = _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():  # HealthCheck, Phase
            return _Anything()
        return lambda *args, **kwargs: pytest.mark.skip(reason="hypothesis is not installed")


if find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = _NoHypothesis("hypothesis")
    sys.modules["hypothesis"].__spec__ = ModuleSpec("hypothesis", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds a test may take; without pytest-timeout nothing enforces it")


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout: seconds this test may take")
    if config.option.markexpr == "gpu":
        os.environ["TRITON_INTERPRET"] = "0"  # tests/conftest.py has chosen the interpreter
    elif COUNTS_WITH_ARRAYS:
        _repair_the_interpreter()


def _repair_the_interpreter() -> None:
    from triton.runtime import interpreter

    patched = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
