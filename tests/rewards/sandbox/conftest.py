"""The sandbox on this machine; tests that need a layer that is not here skip and say which."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator

import pytest

from fastrl.rewards.sandbox import Sandbox
from fastrl.rewards.sandbox.landlock import SCOPES_SINCE, version
from fastrl.rewards.sandbox.layers import Layers, found_layers, without
from fastrl.rewards.sandbox.seccomp import ARCHITECTURES


@pytest.fixture(scope="session")
def weak_layers() -> Layers:
    """All but bubblewrap."""
    if version() < SCOPES_SINCE or platform.machine() not in ARCHITECTURES:
        pytest.skip(f"needs landlock {SCOPES_SINCE}, this kernel has {version()}; and a seccomp filter")
    return without(found_layers(), "bwrap")


@pytest.fixture(scope="session")
def layers(weak_layers: Layers) -> Layers:
    """All."""
    try:
        subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"needs a working bubblewrap (apt-get install bubblewrap): {error}")
    return found_layers()


@pytest.fixture(scope="session")
def sandbox(layers: Layers) -> Iterator[Sandbox]:
    made = Sandbox(slots=2)
    yield made
    made.close()


@pytest.fixture(scope="session")
def processes_below() -> Callable[[list[int]], list[int]]:
    """A function from process ids to those of all their descendants."""

    def find(processes: list[int]) -> list[int]:
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
        pairs = list(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
        found = list(processes)
        for parent in found:
            found += [process for process, its_parent in pairs if its_parent == parent]
        return found[len(processes) :]

    return find
