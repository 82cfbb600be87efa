"""The part that every sandbox has in common: programs run in threads, in order, and none outlives an exception.

A program is started and watched in a thread of the pool, also a single one. Ctrl-C reaches the main thread alone, so that it
never falls between a process that was started and the line that would have ended it.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from antipasto.sandbox.protocol import Limits, Program, Result, Sandbox

if TYPE_CHECKING:
    from typing_extensions import Self


class Pooled(Sandbox, abc.ABC):
    """A `Sandbox` that can run one program in the thread that asks for it.

    Args:
        limits: of each program; by default `Limits`'.
    """

    def __init__(self, limits: Limits | None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._stops: set[threading.Event] = set()
        self._closed = False

    @abc.abstractmethod
    def _run(self, program: Program, stop: threading.Event) -> Result:
        """One program to its end; soon after ``stop`` is set, it is killed and a `SandboxError` raised."""

    def run(self, program: Program) -> Result:
        return self.run_many([program])[0]

    def run_many(self, programs: Iterable[Program], workers: int = 1) -> list[Result]:
        programs = list(programs)
        for program in programs:
            if not isinstance(program, Program):
                raise ValueError(f"Expected programs of the type Program, got {type(program).__name__}.")
            if (size := program.file_bytes) > (most := self.limits.file_bytes):
                raise ValueError(f"A program's files take {size} bytes, of which file_bytes allows {most}.")
        if workers < 1:
            raise ValueError(f"workers must be 1 or more, got {workers}.")
        stop = threading.Event()
        with self._lock:
            if self._closed:
                raise ValueError("This sandbox is closed: make another.")
            self._stops.add(stop)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        try:
            return list(pool.map(lambda program: self._run(program, stop), programs))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            with self._lock:
                self._stops.discard(stop)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for stop in self._stops:
                stop.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
