"""Programs in Linux namespaces of their own, made without privileges by bubblewrap (``bwrap``).

What a program finds: ``/box``, its working folder, and ``/tmp``, both of limited size and in memory; an interpreter, ``/usr``
and the libraries, to read; five devices; a ``/proc`` of its own processes. User 1000 without any capability, no network but a
loopback of its own, the environment of `antipasto.sandbox.protocol.environment`.

    what                                by
    ──────────────────────────────────  ────────────────────────────────────────────────────────────────────────────────────
    no file of the machine              a mount namespace; all of it read-only but /box and /tmp
    no network, no Unix socket outside  a network namespace; seccomp for the families that it does not divide
    no process outside, none left over  a pid namespace: when its first process ends, the kernel kills all others
    processes and threads               RLIMIT_NPROC, counted in the user namespace; the watch
    memory                              the watch: sum of resident memory; RLIMIT_AS by process; seccomp where neither counts
    time, output, files                 the watch; RLIMIT_CPU, a pipe that is read no further, the size of a tmpfs
    no way out through the kernel       no capabilities, no_new_privs, no further user namespaces, seccomp; see below

The first process in the sandbox is a shell of ours, under the same limits and the same filter. It waits until we have opened
``/box``, by ``/proc/PID/root``; that keeps the files when the namespaces are gone. So they are read after everything is dead.

For root, the kernel counts no processes. So root's programs run as the user ``nobody`` outside as well: a first bwrap shows
what the sandbox will show and no more, setpriv(1) becomes nobody in there, and a second bwrap goes on as anybody's would. It
is shown by root because nobody may not walk to an interpreter in root's home.

What it does not protect from: holes in the kernel; side channels; a machine kept busy within the limits. Buffers of sockets
and pipes are the kernel's memory and count nowhere; `OPEN_FILES` bounds them. If the machine runs out of memory, the kernel
kills the sandbox first, unless the program asked not to be.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath

from antipasto.sandbox import seccomp
from antipasto.sandbox.leftovers import read_left
from antipasto.sandbox.pool import Pooled
from antipasto.sandbox.protocol import (
    FILE,
    Limits,
    NotIsolatedError,
    Program,
    Result,
    SandboxError,
    as_bytes,
    environment,
)
from antipasto.sandbox.watching import Usage, numbers_in, opened, over, rlimits, use, watch

BOX = "/box"
_NOBODY = "65534"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_STDIN = "/run/stdin"
_ABOVE = 9  # processes that the kernel allows above the limit: our shell, and some for the watch to see
_SETUP_SECONDS = 30.0
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid

# Its standard input is our socket: it says that all is mounted, and waits for leave. `exec` in a subshell: no builtin is run,
# and what the shell has to say of a program's death goes nowhere.
_SHELL = f"""
umask 022
echo 1000 > /proc/self/oom_score_adj
echo ready >&0
read -r go || exit 125
exec 3>&2 2>/dev/null <{_STDIN}
(exec "$@" 2>&3 3>&-)
exit $?
"""

_PROBE = """
readlink /proc/self/ns/*
grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status
sed -n 's/^ *\\([^ :]*\\):.*/network \\1/p' /proc/net/dev
test -e "$1" && echo canary
prlimit --nproc=6 -- sh -c 'for i in 1 2 3 4 5 6 7 8 9 10; do sleep 9 & echo forked; done'
echo end
"""


class Bubblewrap(Pooled):
    """Runs programs isolated from the machine. Refuses to be made where that does not work.

    Args:
        limits: of each program; by default `Limits`'.
        visible: folders that programs may read, besides ``/usr`` and the libraries; by default this Python's installation,
            of a virtual environment the one that it was made from. The ``bin`` of each comes first in ``PATH``.

    Raises:
        NotIsolatedError: bubblewrap is missing or too old, or does not isolate on this machine: a program is run to see.
        ValueError: a folder that does not exist, or is in the way of the sandbox's own.
    """

    def __init__(self, limits: Limits | None = None, visible: Sequence[str | Path] = (sys.base_prefix,)) -> None:
        super().__init__(limits)
        self._visible = [_checked(folder) for folder in visible]
        self._path = ":".join([*(f"{folder}/bin" for folder in self._visible), "/usr/local/bin:/usr/bin:/bin"])
        self._filter = seccomp.program()
        self._tools = {name: _tool(name) for name in ("bwrap", *(["setpriv"] if os.geteuid() == 0 else []))}
        self._check()

    def _run(self, program: Program, stop: threading.Event) -> Result:
        try:
            return self._run_within(self.limits, program, stop)
        except OSError as error:  # no memory or descriptor to be had
            raise SandboxError(f"A program could not be run: {error}.") from error

    def _run_within(self, limits: Limits, program: Program, stop: threading.Event) -> Result:
        files = {name: as_bytes(content, name) for name, content in program.files.items()}
        with ExitStack() as held:
            # what is left open here is closed whatever comes, a process of ours killed
            process, control = self._start(limits, program, files, held)
            inside = _Inside(process, control, held)
            control.sendall(b"go\n")
            control.close()
            seen = watch(process, limits, inside.usage, inside.kill, stop)
            if seen.limit is None:  # between two looks
                seen = dataclasses.replace(seen, limit=over(limits, Usage(file_bytes=inside.file_bytes())))
            return seen.result(*read_left(inside.box, program.keep, limits.output_bytes))

    def _start(
        self, limits: Limits, program: Program, files: Mapping[str, bytes], held: ExitStack
    ) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """bwrap, started, and our end of the shell's standard input."""
        with ExitStack() as given:  # to bwrap, which has them once it is started
            control, theirs = socket.socketpair()
            control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            held.callback(control.close)
            given.callback(theirs.close)
            memory = {name: _in_memory(content, given) for name, content in files.items()}
            stdin, rules = _in_memory(as_bytes(program.stdin, "stdin"), given), _in_memory(self._filter, given)
            words = [*self._isolation(limits), "--seccomp", str(rules)]
            for name, file in memory.items():
                words += ["--perms", "0755", "--file", str(file), f"{BOX}/{name}"]
            words += ["--perms", "0444", "--file", str(stdin), _STDIN, "--remount-ro", "/"]
            inside = rlimits(limits, processes=limits.processes + _ABOVE, file_bytes=2 * limits.file_bytes)
            process = subprocess.Popen(
                [*self._as_nobody(), *words, "--", *inside, "/bin/sh", "-c", _SHELL, "sh", *program.argv],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(BOX, self._path),  # of all of them: nothing of ours is there to be found
                cwd="/",
                pass_fds=[*memory.values(), stdin, rules],
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
            held.callback(_end, process)
        return process, control

    def _view(self) -> list[str]:
        """The files that a program can read, as words for bwrap."""
        words = ["--ro-bind", "/usr", "/usr", "--dir", "/etc", "--dir", "/dev"]
        for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
            path = Path(name)
            if path.is_symlink():
                words += ["--symlink", str(path.readlink()), name]
            elif path.exists():
                words += ["--ro-bind", name, name]
        for name in ("/etc/alternatives", "/etc/ld.so.cache"):
            words += ["--ro-bind-try", name, name]
        for device in _DEVICES:
            words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        for name, stream in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
            words += ["--symlink", f"/proc/self/fd{stream}", f"/dev/{name}"]
        for folder in self._visible:
            for above in reversed(PurePosixPath(folder).parents[:-1]):  # bwrap makes these for their owner alone
                words += ["--dir", str(above)]
            words += ["--ro-bind", folder, folder]
        return words

    def _as_nobody(self) -> list[str]:
        """For root, what executes another command as nobody, where there is nothing but what the sandbox will show."""
        if os.geteuid() != 0:
            return []
        # a pid namespace: root's process may not kill nobody's when it dies, but the kernel kills all in there
        words = [self._tools["bwrap"], "--die-with-parent", "--unshare-pid", "--dir", "/tmp", *self._view()]
        words += ["--bind", "/proc", "/proc", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--"]
        return [*words, self._tools["setpriv"], "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups", "--"]

    def _isolation(self, limits: Limits) -> list[str]:
        """bwrap, with all but the program's own files."""
        words = [self._tools["bwrap"], "--die-with-parent", "--new-session", "--as-pid-1", "--disable-userns"]
        words += [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts", "cgroup-try")]
        words += ["--uid", "1000", "--gid", "1000", "--cap-drop", "ALL", "--hostname", "sandbox"]
        for folder in (BOX, "/tmp"):
            words += ["--size", str(2 * limits.file_bytes), "--tmpfs", folder]
        return [*words, *self._view(), "--symlink", "/tmp", "/dev/shm", "--proc", "/proc", "--chdir", BOX]

    def _check(self) -> None:
        """Run a program that looks for what it should not find.

        Raises:
            NotIsolatedError: it found something, or was not run.
        """
        limits = Limits(cpu_seconds=10, wall_seconds=20, processes=32)
        with tempfile.NamedTemporaryFile() as canary:
            probe = Program(["/bin/sh", "-c", _PROBE, "sh", canary.name])
            try:
                found = self._run_within(limits, probe, threading.Event())
            except (SandboxError, OSError) as error:
                raise NotIsolatedError(_not_isolated(str(error))) from error
        if wrong := _found_wrong(found.stdout.decode()):
            raise NotIsolatedError(_not_isolated(f"{wrong}. {found.stderr.decode(errors='replace')}".strip()))


class _Inside:
    """A sandbox whose mounts are made and whose program has not begun: what is looked at from outside of it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, held: ExitStack) -> None:
        control.settimeout(_SETUP_SECONDS)
        try:
            ready, sent, *_ = control.recvmsg(16, socket.CMSG_SPACE(_CREDENTIALS.size))
        except TimeoutError:
            raise SandboxError(f"bwrap was not ready after {_SETUP_SECONDS:g} seconds.") from None
        if ready != b"ready\n":
            said = process.communicate()[1].decode(errors="replace").strip()
            raise SandboxError(f"bwrap did not start the program: {said or f'exit code {process.returncode}'}")
        first, *_ = _CREDENTIALS.unpack(sent[0][2])  # the kernel says who sent it, by the number that it has out here
        self._first = os.pidfd_open(first)
        held.callback(os.close, self._first)
        root = f"/proc/{first}/root"
        self.box, self._tmp, self._proc = (
            held.enter_context(opened(root + folder)) for folder in (BOX, "/tmp", "/proc")
        )

    def usage(self) -> Usage:
        used = use(self._proc, numbers_in(self._proc))
        without_shell = used.processes - 1
        return dataclasses.replace(used, processes=without_shell, file_bytes=self.file_bytes())

    def file_bytes(self) -> int:
        """What is in files, with what the files themselves take; also after all are dead."""
        found = [os.statvfs(folder) for folder in (self.box, self._tmp)]
        return sum((f.f_blocks - f.f_bfree) * f.f_frsize + (f.f_files - f.f_ffree - 1) * FILE for f in found)

    def kill(self) -> None:
        """Kill the first process of the pid namespace, and with it all."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._first, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill bwrap, if it still runs; what it started dies with it."""
    process.kill()
    with process:  # waits, and closes the pipes
        pass


def _in_memory(content: bytes, held: ExitStack) -> int:
    file = os.memfd_create("sandbox")
    held.callback(os.close, file)
    with open(file, "wb", closefd=False) as writer:
        writer.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _tool(name: str) -> str:
    if path := shutil.which(name):
        return path
    raise NotIsolatedError(_not_isolated(f"there is no {name}"))


def _checked(folder: str | Path) -> str:
    """A folder to be shown, as an absolute path."""
    path = Path(folder).absolute()
    if not path.is_dir():
        raise ValueError(f"visible: {folder} is not a folder.")
    ours = [Path(name) for name in (BOX, "/proc", "/dev", "/run", "/tmp")]
    if any(own.is_relative_to(path) or (path.is_relative_to(own) and own != Path("/tmp")) for own in ours):
        raise ValueError(f"visible: {folder} is in the way of the sandbox's own {', '.join(map(str, ours))}.")
    return str(path)


def _found_wrong(said: str) -> str:
    """What the probe shows that should not be; empty if nothing."""
    lines = said.split("\n")
    spaces = dict(re.findall(r"^(\w+):\[(\d+)\]$", said, re.MULTILINE))
    for name in ("user", "pid", "net", "ipc", "uts", "mnt"):
        if spaces.get(name) in (None, str(Path(f"/proc/self/ns/{name}").readlink()).partition("[")[2][:-1]):
            return f"a program is in no {name} namespace of its own"
    if "canary" in lines:
        return "a program sees files of the machine"
    for line, meaning in {
        "CapEff:\t0000000000000000": "has capabilities",
        "NoNewPrivs:\t1": "may gain privileges",
        "Seccomp:\t2": "is not held to a list of system calls",
        "end": "did not run to its end",
    }.items():
        if line not in lines:
            return f"a program {meaning}"
    if [line for line in lines if line.startswith("network ") and line != "network lo"]:
        return "a program has network interfaces"
    if not 1 <= lines.count("forked") <= 5:
        return "the number of processes cannot be limited, which needs Linux 5.14"
    return ""


def _not_isolated(what: str) -> str:
    return (
        f"Programs cannot be isolated on this machine: {what}. Needed are Linux 5.14, bubblewrap 0.8 (Debian: apt-get install "
        "bubblewrap) and user namespaces for everybody (Ubuntu 24: sysctl kernel.apparmor_restrict_unprivileged_userns=0; in "
        "a container: its runtime must allow them)."
    )
