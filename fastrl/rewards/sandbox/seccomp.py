"""A seccomp filter written from Python: which system calls end in EPERM, and its installation.

Allowed by default, as honest programs are many; refused is what reaches past namespaces: other processes' memory, new
namespaces and mounts, sockets, kernel features with a record of escapes, and memory that no limit counts (memfd, SysV,
shared anonymous pages). A foreign architecture, x32 included, kills. Also sent into the sandbox; Python 3.10.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; numbers of arch/x86 and asm-generic unistd.h.
"""

from __future__ import annotations

import ctypes
import struct

# name: (x86_64, aarch64); None where the machine has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "perf_event_open": (298, 241),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "personality": (135, 92),
    "vhangup": (153, 58),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "socket": (41, 198),  # pairs are allowed: asyncio needs one
}
CLONE, CLONE3, SOCKETPAIR, MMAP = (56, 220), (435, 435), (53, 199), (9, 222)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEWUSER, PID, NET, IPC, UTS, NS, CGROUP and TIME
_SHARED_ANONYMOUS = 0x21
_AF_UNIX = 1


def filter_program(machine: str) -> bytes:
    """The filter as `struct sock_filter[]`.

    Args:
        machine: a key of ARCHITECTURES, as `platform.machine()` says it.

    Raises:
        ValueError: another machine.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(f"no seccomp filter for the machine {machine!r}; there is one for {', '.join(ARCHITECTURES)}")
    column, architecture = ARCHITECTURES[machine]
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    lines += [(_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)]  # libc falls back to clone, which can be read
    lines += _argument_rule(CLONE[column], 0, [(_ANY_BIT, 0, 1, _NEW_NAMESPACES), (_RETURN, 0, 0, _EPERM)])
    lines += _argument_rule(SOCKETPAIR[column], 0, [(_EQUAL, 1, 0, _AF_UNIX), (_RETURN, 0, 0, _EPERM)])
    shared = [(_AND, 0, 0, _SHARED_ANONYMOUS), (_EQUAL, 0, 1, _SHARED_ANONYMOUS), (_RETURN, 0, 0, _EPERM)]
    lines += _argument_rule(MMAP[column], 3, shared)
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def install(program: bytes) -> None:
    """Bind this process and its children to the filter, for good.

    Raises:
        OSError: the kernel refuses.
    """

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    argument = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, ctypes.byref(argument), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filter refused")


def _argument_rule(
    number: int, argument: int, rule: list[tuple[int, int, int, int]]
) -> list[tuple[int, int, int, int]]:
    """Apply `rule` to the low half of an argument of one call, then load the call's number again."""
    inner = [(_LOAD, 0, 0, 16 + 8 * argument), *rule, (_LOAD, 0, 0, 0)]
    return [(_EQUAL, 0, len(inner), number), *inner]
