"""Landlock: only listed paths stay reachable, and signals and abstract sockets end at the sandbox's border.

It holds between processes of one user, where a namespace may not. Also sent into the sandbox; Python 3.10.

Source: Linux, Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

SCOPES_SINCE = 6  # the version of the interface that first stops signals

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_EXECUTE, _WRITE, _READ_FILE, _READ_DIRECTORY, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_OF_FILES = _EXECUTE | _WRITE | _READ_FILE | _TRUNCATE
_MAKE_DEVICES = 1 << 6 | 1 << 11
_READ = _EXECUTE | _READ_FILE | _READ_DIRECTORY


def version() -> int:
    """The kernel's version of the interface; 0 when it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Close every path but these to this process and its children, for good. Paths that do not exist are skipped.

    Args:
        readable: files and directories that may be read and executed, with all below them.
        writable: those that may be changed too; no devices can be made there.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    found = version()
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(found, 16)) - 1
    rules = struct.pack("=QQQ", handled, 3 if found >= 4 else 0, 3 if found >= SCOPES_SINCE else 0)
    size = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16}.get(found, 24)
    ruleset = _checked(libc.syscall(_CREATE, rules, ctypes.c_size_t(size), ctypes.c_uint32(0)))
    for paths, access in ((readable, _READ), (writable, handled & ~_MAKE_DEVICES)):
        for path in paths:
            if os.path.exists(path):
                _allow(libc, ruleset, path, access & handled)
    no_new_privileges = 38
    _checked(libc.prctl(no_new_privileges, 1, 0, 0, 0))
    _checked(libc.syscall(_RESTRICT, ruleset, ctypes.c_uint32(0)))
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(place).st_mode):
        access &= _OF_FILES
    rule = struct.pack("=Qi", access, place)
    _checked(libc.syscall(_ADD_RULE, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0)))
    os.close(place)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock refused")
    return result
