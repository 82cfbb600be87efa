"""A started program, watched to its end: its output, what it uses, the clock.

Limits are kept twice. The kernel refuses to go beyond `rlimits`, at once and whatever the program does; that is a step above
the limit, and by process. Every `LOOK` seconds, what all processes use together is compared with the limit itself, and a
program that is above it is killed: so it ends soon, and it is known by which limit.

Output is read as it comes, into no more memory than its limit. The first byte beyond ends the program.
"""

from __future__ import annotations

import dataclasses
import math
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from antipasto.sandbox.protocol import LimitName, Limits, Result, SandboxError

LOOK = 0.02
OPEN_FILES = 128  # descriptors of one process
_PAGE, _TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What all processes of a program use together."""

    memory_bytes: int = 0
    cpu_seconds: float = 0.0
    processes: int = 0
    file_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Watched:
    """How it ended."""

    exit_code: int
    limit: LimitName | None
    output: tuple[bytes, bytes]
    truncated: tuple[bool, bool]
    wall_seconds: float

    def result(self, files: Mapping[str, bytes], refused: Mapping[str, str]) -> Result:
        """With the files that it left."""
        return Result(
            self.exit_code, self.limit, *self.output, *self.truncated, self.wall_seconds, dict(files), dict(refused)
        )


def rlimits(limits: Limits, *, processes: int | None, file_bytes: int) -> list[str]:
    """The command of util-linux that executes another under limits which that cannot raise again; its words follow.

    Memory is address space, of which a program may have twice what it may use. ``processes`` counts all processes and threads
    of the user in its user namespace: on the machine itself that is everything the user runs, so there it must be None.
    """
    most = {
        "core": 0,
        "cpu": math.ceil(limits.cpu_seconds) + 1,
        "as": 2 * limits.memory_bytes,
        "fsize": file_bytes,
        "nofile": OPEN_FILES,
        "memlock": 65536,
        "msgqueue": 0,
        "rtprio": 0,
    }
    if processes is not None:
        most["nproc"] = processes
    return ["/usr/bin/prlimit", *(f"--{name}={value}" for name, value in most.items()), "--"]


def use(proc: int, pids: Iterable[int], session: int | None = None) -> Usage:
    """What processes use, as /proc says, an open folder; of one session alone if given.

    The time of children that ended is in that of the process that waited for them.
    """
    pages = ticks = threads = 0
    for pid in pids:
        with suppress(OSError):  # one that has just ended
            stat = os.open(f"{pid}/stat", os.O_RDONLY, dir_fd=proc)
            try:
                # the name stands in parentheses and may have any byte in it; state, the third field, comes after
                fields = os.read(stat, 4096).rpartition(b")")[2].split()
            finally:
                os.close(stat)
            if fields and (session is None or int(fields[3]) == session):
                ticks += sum(map(int, fields[11:15]))
                threads += int(fields[17])
                pages += int(fields[21])
    return Usage(pages * _PAGE, ticks / _TICK, threads)


def numbers_in(proc: int) -> list[int]:
    """The processes that are in an open /proc."""
    return [int(name) for name in os.listdir(proc) if name.isdigit()]


def watch(
    process: subprocess.Popen[bytes],
    limits: Limits,
    look: Callable[[], Usage],
    kill: Callable[[], None],
    stop: threading.Event,
) -> Watched:
    """Watch a process whose output is piped until it and all that it started have ended.

    Args:
        process: just started.
        limits: of all of it together.
        look: what it uses.
        kill: ends all of it; after that, waiting for ``process`` does not last. Called however the watch ends.
        stop: ends it.

    Raises:
        SandboxError: ``stop`` was set.
    """
    start = time.monotonic()

    def end() -> int:
        if process.returncode is None:  # until it is waited for, nobody else can have its number
            kill()
        return process.wait()

    try:
        with _Output(process, limits.output_bytes) as output:
            limit = _until_the_end(output, limits, start, look, stop)
            exit_code = _shells(end())
            wall = time.monotonic() - start
            output.rest()  # what is in the pipes; a child that escaped may hold them open
    finally:
        end()
    by_signal: dict[int, LimitName] = {128 + signal.SIGXCPU: "cpu", 128 + signal.SIGXFSZ: "files"}
    limit = limit or ("output" if output.over else by_signal.get(exit_code))
    return Watched(exit_code, limit, output.texts, output.truncated, wall)


def _until_the_end(
    output: _Output, limits: Limits, start: float, look: Callable[[], Usage], stop: threading.Event
) -> LimitName | None:
    """The limit that is passed first; None if the process ends before."""
    next_look = start
    while not output.read(LOOK):
        if stop.is_set():
            raise SandboxError("The sandbox was closed while a program ran in it.")
        if output.over:
            return "output"
        now = time.monotonic()
        if now >= next_look:
            next_look = now + LOOK
            if limit := over(limits, look(), now - start):
                return limit
    return None


def over(limits: Limits, usage: Usage, wall_seconds: float = 0.0) -> LimitName | None:
    """The first limit that is passed.

    Example:
        >>> over(Limits(processes=4), Usage(processes=5)), over(Limits(), Usage())
        ('processes', None)
    """
    found: dict[LimitName, bool] = {
        "processes": usage.processes > limits.processes,
        "memory": usage.memory_bytes > limits.memory_bytes,
        "files": usage.file_bytes > limits.file_bytes,
        "cpu": usage.cpu_seconds > limits.cpu_seconds,
        "wall": wall_seconds > limits.wall_seconds,
    }
    return next((name for name, passed in found.items() if passed), None)


class _Output:
    """Both streams of a process, and its end."""

    def __init__(self, process: subprocess.Popen[bytes], most: int) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._most = most
        self._got = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        self._ended = os.pidfd_open(process.pid)
        self._selector = selectors.DefaultSelector()
        for stream in self._got:
            os.set_blocking(stream, False)
            self._selector.register(stream, selectors.EVENT_READ)
        self._selector.register(self._ended, selectors.EVENT_READ)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        os.close(self._ended)

    def read(self, seconds: float) -> bool:
        """Read what there is, waiting for it no longer than this; whether the process has ended."""
        ready = [key.fd for key, _ in self._selector.select(seconds)]
        for stream in ready:
            if stream != self._ended:
                self._take(stream)
        return self._ended in ready

    def rest(self) -> None:
        """Read what is still in the pipes, up to the limit."""
        for stream in self._got:
            while self._take(stream):
                pass

    def _take(self, stream: int) -> bool:
        """Read once; whether there may be more. One byte beyond the limit is kept, to know that it was passed."""
        got = self._got[stream]
        try:
            chunk = os.read(stream, min(65536, self._most + 1 - len(got)))
        except BlockingIOError:
            return False
        if not chunk and stream in self._selector.get_map():
            self._selector.unregister(stream)
        got += chunk
        return bool(chunk)

    @property
    def over(self) -> bool:
        return any(self.truncated)

    @property
    def truncated(self) -> tuple[bool, bool]:
        one, other = (len(got) > self._most for got in self._got.values())
        return one, other

    @property
    def texts(self) -> tuple[bytes, bytes]:
        one, other = (bytes(got[: self._most]) for got in self._got.values())
        return one, other


def _shells(returncode: int) -> int:
    """Python's −n of a signal as 128 + n."""
    return 128 - returncode if returncode < 0 else returncode


@contextmanager
def opened(path: str, *, dir_fd: int | None = None) -> Iterator[int]:
    """A folder, open."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
    try:
        yield folder
    finally:
        os.close(folder)
