"""What a run computes on: the versions, the device and the commit that a result needs beside its configuration."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastrl
from fastrl.train.device import GIB
from fastrl.train.distributed import is_first, size
from fastrl.train.durable import write_text

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton")


def write_environment(run_dir: Path, device: torch.device) -> None:
    """Write `environment.json`, of the first rank; a resumed run writes that of its new start over it."""
    if not is_first():
        return
    write_text(run_dir / ENVIRONMENT_FILE, json.dumps(environment(device), indent=1) + "\n")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads and the commit of the package, ready for JSON; nothing of the user's environment."""
    return {
        "fastrl": fastrl.__version__,
        "commit": _commit(Path(fastrl.__file__).parent.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(device),
        "ranks": size(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "name": platform.machine()}
    found = torch.cuda.get_device_properties(device)
    memory = round(found.total_memory / GIB, 1)
    return {"type": "cuda", "name": found.name, "memory_gib": memory, "capability": f"{found.major}.{found.minor}"}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """The commit of a source checkout, with "-dirty" when files differ from it; None for an installed package."""
    if not (checkout / ".git").exists():
        return None
    command = ("git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a checkout on a hanging disk: worth no failed run
        return None
    return done.stdout.strip() or None
