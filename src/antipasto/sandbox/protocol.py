r"""What it means to run somebody else's program: what goes in, what it may use, what comes out.

    with Bubblewrap(Limits(wall_seconds=5)) as sandbox:
        result = sandbox.run(Program(["python3", "main.py"], files={"main.py": "print(6 * 7)"}))
    result.ok, result.stdout                                         # True, b"42\n"

Every program gets a working folder of its own, empty but for its files, and a fixed environment (`environment`). It ends when
its first process ends, or at a limit; then all that it started is killed, and only then are the files read that it left.

A program's end, however bad, is a `Result`. A `SandboxError` says that the sandbox failed, and nothing about the program.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing, from Python 3.11 on

LimitName = Literal["cpu", "wall", "memory", "processes", "output", "files"]
"""Which of the `Limits` a program went over."""

MIB = 2**20
FILE = 1024
"""Bytes that a file or folder takes in addition to its contents, about."""
_ARGV_BYTES = 100_000  # the kernel takes 128 KiB a word, and bubblewrap has words of its own


class SandboxError(RuntimeError):
    """A program could not be run to its end. It says nothing about the program."""


class NotIsolatedError(SandboxError):
    """Programs cannot be isolated on this machine. Says what is missing, and what to install or allow."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to run.

    Args:
        argv: the command and its arguments; a command without a slash is looked up in the sandbox's own ``PATH``.
        files: name → content, written to the working folder, executable; a text is written as UTF-8. Names are relative, with
            ``/`` between folders, which are made.
        stdin: what it reads from its standard input.
        keep: names of the files to hand back, if it leaves them.

    Raises:
        ValueError: no command, a name that leads out of the working folder, or a text that UTF-8 cannot say.
    """

    argv: Sequence[str]
    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)
    stdin: str | bytes = b""
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.argv, str) or not self.argv or not all(isinstance(word, str) for word in self.argv):
            raise ValueError(f"argv must be a command and its arguments, a list of texts, got {self.argv!r}.")
        if not self.argv[0] or self.argv[0].startswith("-") or any("\0" in word for word in self.argv):
            raise ValueError(f"argv must begin with a command, and have no NUL in it, got {list(self.argv)!r}.")
        if (size := sum(len(word.encode(errors="replace")) for word in self.argv)) > _ARGV_BYTES:
            raise ValueError(f"argv must have no more than {_ARGV_BYTES} bytes, got {size}: put them in a file.")
        if isinstance(self.keep, str):
            raise ValueError(f"keep must be a list of names, got the text {self.keep!r}.")
        for name in (*self.files, *self.keep):
            _check_name(name)
        for name in self.files:
            if above := [str(folder) for folder in PurePosixPath(name).parents if str(folder) in self.files]:
                raise ValueError(f"files has {above[0]!r} as a file, and as the folder of {name!r}.")
        for name, content in {**self.files, "stdin": self.stdin}.items():
            as_bytes(content, name)

    @property
    def file_bytes(self) -> int:
        """What its files take, as `Limits` counts."""
        return sum(len(as_bytes(content, name)) + FILE for name, content in self.files.items())


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use, all of its processes together. A sandbox's own page says how strictly each is kept.

    Args:
        cpu_seconds: time on a processor.
        wall_seconds: time on the clock.
        memory_bytes: memory in use. A page that two processes share counts twice.
        processes: processes and threads at once.
        output_bytes: of each of standard output and standard error, and of each file handed back.
        file_bytes: all files that are there at once. Each file and folder counts as 1 KiB more than what is in it.

    Raises:
        ValueError: a limit that is not a finite number above zero, or not whole where it counts things.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 20.0
    memory_bytes: int = 512 * MIB
    processes: int = 32
    output_bytes: int = MIB
    file_bytes: int = 16 * MIB

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            kind, wanted = (numbers.Real, "number") if name.endswith("seconds") else (numbers.Integral, "whole number")
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a {wanted} above zero, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended, and what it left.

    Attributes:
        exit_code: as shells count: its own, or 128 + n if signal n ended it; 137 if a limit did. 126 and 127: the command
            could not be executed, or was not found.
        limit: the limit that it went over; None if it ended by itself.
        stdout: what it wrote to standard output, the first ``output_bytes`` of it.
        stderr: what it wrote to standard error, likewise.
        stdout_truncated: whether there was more.
        stderr_truncated: whether there was more.
        wall_seconds: from its start to its end.
        files: name → content, of those it was to `keep`.
        refused: name → why, of those that are not in ``files``: missing, a symlink, too large ….
    """

    exit_code: int
    limit: LimitName | None
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool
    wall_seconds: float
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0, within all limits."""
        return self.exit_code == 0 and self.limit is None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that ended it, by its exit code; None if none did. A program can exit with such a code by itself."""
        try:
            return signal.Signals(self.exit_code - 128)
        except ValueError:
            return None


class Sandbox(Protocol):
    """Runs programs; a context manager, at whose end whatever still runs is killed.

    Example:
        >>> from antipasto.sandbox import Remote
        >>> def service(program, limits):  # stands for one that runs programs
        ...     return Result(0, None, program.argv[1].encode(), b"", False, False, 0.1)
        >>> with Remote(service) as sandbox:
        ...     [result.stdout for result in sandbox.run_many([Program(["echo", "a"]), Program(["echo", "b"])])]
        [b'a', b'b']
    """

    def run(self, program: Program) -> Result:
        """Run one program to its end.

        Raises:
            SandboxError: it could not be run.
            ValueError: its files are larger than the limits allow.
        """

    def run_many(self, programs: Iterable[Program], workers: int = 1) -> list[Result]:
        """The results of some programs, in their order.

        If one of them raises, or at Ctrl-C, all that runs is killed before the exception comes out.

        Args:
            programs: what to run.
            workers: how many run at once.
        """

    def close(self) -> None:
        """Kill what still runs; nothing runs here any more."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def as_bytes(content: str | bytes, name: str) -> bytes:
    """What is written of a text, or of bytes.

    Raises:
        ValueError: it is neither, or has half of a surrogate pair in it.
    """
    if isinstance(content, bytes):
        return content
    if not isinstance(content, str):
        raise ValueError(f"{name}: expected a text or bytes, got {type(content).__name__}.")
    try:
        return content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: the text cannot be written as UTF-8: {error}.") from error


def environment(home: str, path: str) -> dict[str, str]:
    """All environment variables of a program, the same on every machine but for the two given.

    One OpenMP thread: NumPy would start one a core, and threads count as processes.
    """
    fixed = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC", "OMP_NUM_THREADS": "1"}
    return {"PATH": path, "HOME": home, **fixed, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}


def _check_name(name: str) -> None:
    if not isinstance(name, str) or "\0" in name or not name or name != str(PurePosixPath(name)):
        raise ValueError(f"A file's name must be a relative path without '.', NUL or doubled slashes, got {name!r}.")
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise ValueError(f"A file's name must lead to a place in the working folder, got {name!r}.")
