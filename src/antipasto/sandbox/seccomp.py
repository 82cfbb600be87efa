"""The system calls that a program may not make: what no namespace divides, and what holds memory that no process shows.

`program` is a filter of classic BPF, as seccomp(2) and bubblewrap's ``--seccomp`` take it: 8 bytes an instruction,
(code: 16 bits, jump if true: 8, jump if false: 8, k: 32), on the struct (nr: 32, arch: 32, instruction pointer: 64, args).
A call in the list fails with EPERM, as if it had been asked for without the right to it; one of another architecture (32 bits
on 64) ends the process. Sockets are made for IPv4, IPv6 and Unix alone: AF_VSOCK reaches a virtual machine's host from inside
of a network namespace.

The numbers are the kernel's, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct

from antipasto.sandbox.protocol import NotIsolatedError

REFUSED = {
    # keyrings belong to the user
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # what programs do not need, and the kernel's holes have often been in
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_by_handle_at": (304, 265),
    # memory that stays when no process maps it
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
"""Name → number on x86_64, on aarch64."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 41), "aarch64": (1, 0xC00000B7, 198)}  # column, AUDIT_ARCH_…, socket
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_X32 = 0x40000000  # calls of x86_64 with 32-bit pointers have this bit, and the same numbers otherwise


def program(machine: str | None = None) -> bytes:
    """The filter, for this machine or another ``platform.machine()``.

    Raises:
        NotIsolatedError: it is neither x86_64 nor aarch64.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise NotIsolatedError(
            f"Isolation needs x86_64 or aarch64, whose system calls are known; this machine is {machine}."
        )
    column, arch, open_socket = _ARCHITECTURES[machine]
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    lines = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for numbers in REFUSED.values():
        lines += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _REFUSE)]
    lines += [(_EQUAL, 1, 0, open_socket), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    for family in families:
        lines += [(_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ALLOW)]
    lines.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
