"""The layers of the sandbox, which of them this machine has, and what a process is started with under them.

| layer | what it is |
| --- | --- |
| uid | root drops to a user of its own before anything else: bubblewrap started by root is no boundary |
| bwrap | own user, process, network, IPC and host-name namespaces; the runtime, read-only; no capabilities |
| landlock | the same files once more, held by another part of the kernel; no signals to the outside |
| seccomp | the system calls that reach past all that |
| rlimits | CPU time, address space, processes, files |
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastrl.rewards.sandbox.landlock import SCOPES_SINCE, version
from fastrl.rewards.sandbox.seccomp import ARCHITECTURES, filter_program

INSTALL_BWRAP = "apt-get install bubblewrap (or dnf install bubblewrap)"
FIRST_UID = 60600  # in a range that systemd leaves free; slot i is user FIRST_UID + i
MOST_SLOTS = 100
MIB = 1 << 20
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "2",  # glibc's arenas eat address space: 64 MiB for each thread
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Layers:
    """What submissions are run under.

    Attributes:
        python: the interpreter that runs them, readable by every user.
        runtime: the directories it needs.
        bwrap: bubblewrap's path; "" goes without.
        drops_uid: this process is root, and they are not.
        landlock, seccomp, rlimits: whether the layer is on.
    """

    python: str
    runtime: tuple[str, ...]
    bwrap: str = ""
    drops_uid: bool = False
    landlock: bool = False
    seccomp: bool = False
    rlimits: bool = True


def found_layers(python: str = "") -> Layers:
    """All layers this machine claims to have; `self_test` says whether they hold.

    Args:
        python: interpreter of the submissions; "" takes the system's, or else this one's.

    Raises:
        RuntimeError: there is none that every user can reach, or it does not run.
    """
    choices = [python] if python else ["/usr/bin/python3", "/usr/local/bin/python3", sys.executable]
    python = next((path for path in choices if _is_public(path)), "")
    if not python:
        raise RuntimeError(
            f"the sandbox needs a Python that every user can reach; {', '.join(choices)} is not. "
            "Install one (apt-get install python3) or name one: Sandbox(python=...)"
        )
    return Layers(
        python=os.path.realpath(python),
        runtime=_runtime(python),
        bwrap=shutil.which("bwrap") or "",
        drops_uid=os.getuid() == 0,
        landlock=version() >= SCOPES_SINCE,
        seccomp=platform.machine() in ARCHITECTURES,
    )


def missing_layers(layers: Layers) -> dict[str, str]:
    """Name of each layer that is off -> how to get it."""
    remedies = {
        "uid": "run as root, or as a user that owns nothing of value",
        "bwrap": INSTALL_BWRAP,
        "landlock": "boot Linux 6.12 or newer with landlock in its list of security modules",
        "seccomp": f"use one of {', '.join(ARCHITECTURES)}",
        "rlimits": "turn them on",
    }
    # A user other than root may start bubblewrap as it is.
    has_uid = layers.drops_uid or (os.getuid() != 0 and bool(layers.bwrap))
    has = {
        "uid": has_uid,
        "bwrap": bool(layers.bwrap),
        "landlock": layers.landlock,
        "seccomp": layers.seccomp,
        "rlimits": layers.rlimits,
    }
    return {name: remedy for name, remedy in remedies.items() if not has[name]}


def without(layers: Layers, name: str) -> Layers:
    """The same layers but one."""
    off: dict[str, dict[str, Any]] = {
        "uid": {"drops_uid": False},
        "bwrap": {"bwrap": ""},
        "landlock": {"landlock": False},
        "seccomp": {"seccomp": False},
        "rlimits": {"rlimits": False},
    }
    return replace(layers, **off[name])


def as_json(layers: Layers) -> str:
    """The layers as one line, for another process."""
    return json.dumps(asdict(layers))


def from_json(line: str) -> Layers:
    """The inverse of `as_json`."""
    values = json.loads(line)
    return Layers(**{**values, "runtime": tuple(values["runtime"])})


def doors(layers: Layers, limits: Mapping[str, Any], home: str) -> dict[str, Any]:
    """What the first process inside has to close; read by `inside.close_doors`.

    Args:
        limits: the fields of `Limits`.
        home: the directory that submissions may write to.
    """
    cpu, file = limits["cpu_seconds"], limits["file_mib"] * MIB
    rlimits = {
        "RLIMIT_CPU": (cpu, cpu + 1),  # SIGXCPU, and SIGKILL for those that ignore it
        "RLIMIT_AS": (limits["address_space_mib"] * MIB,) * 2,
        "RLIMIT_NPROC": (limits["processes"],) * 2,
        "RLIMIT_FSIZE": (file, file),
        "RLIMIT_NOFILE": (256, 256),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
    }
    own = [home, "/dev/shm", "/proc"] if layers.bwrap else [home]
    readable = [*layers.runtime, "/etc/ld.so.cache", "/dev/urandom", "/dev/random", "/dev/zero"]
    return {
        "home": home,
        "rlimits": rlimits if layers.rlimits else None,
        "landlock": {"readable": readable, "writable": [*own, "/dev/null"]} if layers.landlock else None,
        "seccomp": filter_program(platform.machine()).hex() if layers.seccomp else None,
    }


def bwrap_arguments(layers: Layers, limits: Mapping[str, Any]) -> list[str]:
    """Bubblewrap's options: the namespaces, and a file system that holds the runtime and nothing else."""
    size = str(limits["file_mib"] * MIB)
    arguments = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    arguments += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    for path in layers.runtime:
        arguments += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    arguments += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    # Nothing needs /closed: it is writable but for landlock, and so shows in the self-test that landlock is on.
    for path in ("/tmp", "/dev/shm", "/closed"):
        arguments += ["--size", size, "--tmpfs", path]
    return [*arguments, "--remount-ro", "/", "--remount-ro", "/dev", "--chdir", "/tmp"]


def _is_public(path: str) -> bool:
    """Whether users that own nothing can reach a program: its directories and itself are executable for all."""
    real = Path(os.path.realpath(path))
    return real.is_file() and all(part.stat().st_mode & 0o001 for part in (real, *real.parents))


@cache
def _runtime(python: str) -> tuple[str, ...]:
    """The directories an interpreter needs, links to them included."""
    ask = "import sys; print(sys.base_prefix, sys.prefix, sep='\\n')"
    try:
        told = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, timeout=30, check=True, env={})
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            f"the sandbox's Python {python} does not run: {error}; name another: Sandbox(python=...)"
        ) from error
    system = ["/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/bin", "/lib", "/lib32", "/lib64"]
    prefixes = [os.path.realpath(prefix) for prefix in told.stdout.splitlines()]
    own = [prefix for prefix in dict.fromkeys(prefixes) if prefix != "/usr"]
    return tuple(path for path in [*system, *own] if os.path.exists(path))
