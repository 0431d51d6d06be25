"""What `fastrl env` reports: versions, devices, which backend each op would choose, and tools of the sandbox."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from fastrl import __version__

if TYPE_CHECKING:
    import torch

REQUIRED = ("torch", "numpy", "safetensors", "transformers", "pyyaml", "rich", "jinja2", "jsonargparse", "triton")
# Extra of pyproject.toml -> its distributions.
OPTIONAL = {
    "data": ("datasets", "pyarrow"),
    "peft": ("peft",),
    "qlora": ("peft", "bitsandbytes"),
    "vllm": ("vllm", "requests"),
    "flash": ("flash-attn",),
    "rewards": ("jsonschema", "math-verify", "reasoning-gym"),
    "judge": ("openai",),
    "peers": ("trl", "liger-kernel", "cut-cross-entropy"),
    "track": ("tensorboard", "trackio", "wandb"),
}
SECONDS = 5  # longest wait for a tool that is asked for its version


def environment() -> dict[str, Any]:
    """Everything `fastrl env` knows, ready for JSON; imports torch when it is installed."""
    found: dict[str, Any] = {
        "fastrl": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "torch_threads": None},
        "packages": {name: _version(name) for name in REQUIRED},
        "optional": {extra: {name: _version(name) for name in names} for extra, names in OPTIONAL.items()},
        "native_extension": find_spec("fastrl._C") is not None,
        "gpus": [],
        "backends": {},
        "sandbox": {"user_id": os.getuid(), "bwrap": _bwrap()},
    }
    if find_spec("torch") is not None:
        import torch

        found["cpu"]["torch_threads"] = torch.get_num_threads()
        found["gpus"] = _gpus()
        devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
        found["backends"] = {device.type: _backends(device) for device in devices}
    return found


def as_json(found: dict[str, Any]) -> str:
    """One JSON object."""
    return json.dumps(found, indent=2)


def as_text(found: dict[str, Any]) -> str:
    """Aligned lines for people; what is absent comes with the command that installs it."""
    rows = [
        ("fastrl", found["fastrl"]),
        ("python", f"{found['python']} ({found['executable']})"),
        ("platform", found["platform"]),
        ("cpu", f"{found['cpu']['cores']} cores, torch uses {found['cpu']['torch_threads']} threads"),
    ]
    rows += [("gpu", _gpu_line(gpu)) for gpu in found["gpus"]] or [("gpu", "none")]
    rows += [(name, version or "not installed") for name, version in found["packages"].items()]
    rows += [(f"extra {extra}", _extra_line(extra, names)) for extra, names in found["optional"].items()]
    built = "built" if found["native_extension"] else "not built: ops run on torch; install with a C++ compiler"
    rows.append(("fastrl._C", built))
    for device, chosen in found["backends"].items():
        rows += [(f"{op} on {device}", backend) for op, backend in chosen.items()]
    rows.append(("sandbox", found["sandbox"]["bwrap"] or "bwrap is not installed: apt install bubblewrap"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _gpu_line(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}, driver {gpu['driver']}"


def _extra_line(extra: str, names: dict[str, str | None]) -> str:
    listed = ", ".join(f"{name} {version or '-'}" for name, version in names.items())
    return listed if all(names.values()) else f"{listed}  (pip install 'fastrl[{extra}]')"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a tool prints, or None when it is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _bwrap() -> str | None:
    """Version of bubblewrap and whether it can make a sandbox here; None when it is not installed."""
    version = _output("bwrap", "--version")
    if version is None:
        return None
    works = _output("bwrap", "--unshare-all", "--ro-bind", "/", "/", "true") is not None
    return f"{version}, {'works' if works else 'cannot make a namespace here'}"


def _gpus() -> list[dict[str, Any]]:
    import torch

    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = drivers.splitlines()[0] if drivers else None
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "driver": driver,
            }
        )
    return found


def _backends(device: torch.device) -> dict[str, str]:
    """Op -> the backend it would choose for tensors on the device."""
    import torch

    from fastrl import ops
    from fastrl.ops.backend import Implementations, choose

    tensor = torch.zeros(1, device=device)
    chosen = {}
    for module in iter_modules(ops.__path__, "fastrl.ops."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, Implementations):
                chosen[value.op] = choose(None, tensor, value)
    return chosen
