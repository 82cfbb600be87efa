"""Programs run as plain child processes under resource limits. **This is no sandbox.**

What a program gets: a temporary folder, a fixed environment, a process group of its own, and the same `Limits`, result and
watch as in `antipasto.sandbox.bubblewrap`. But it can read and write whatever you can, reach the network, kill your processes,
and outlive its end: in a process group of its own it is not killed, in a session of its own not even counted.

For programs that you trust to be no worse than wrong, on a Linux without bubblewrap.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

from antipasto.names import AntiPastoWarning
from antipasto.sandbox.leftovers import read_left
from antipasto.sandbox.pool import Pooled
from antipasto.sandbox.protocol import Limits, Program, Result, SandboxError, as_bytes, environment
from antipasto.sandbox.watching import numbers_in, opened, rlimits, use, watch


class NotASandboxWarning(AntiPastoWarning):
    """Programs run with the rights of whoever runs them."""


class RlimitsOnly(Pooled):
    """Runs programs under resource limits, and nothing else. Says so, at every construction.

    Of the limits, ``file_bytes`` is each file's by itself, and the number of processes is looked at, not enforced.

    Args:
        limits: of each program; by default `Limits`'.
        prefix: a Python installation, whose ``bin`` comes first in ``PATH``; by default this one's.
    """

    def __init__(self, limits: Limits | None = None, prefix: str | Path = sys.base_prefix) -> None:
        super().__init__(limits)
        self.path = f"{prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        warnings.warn(
            "RlimitsOnly is not a sandbox: a program can read, write and kill whatever you can. Use Bubblewrap.",
            NotASandboxWarning,
            stacklevel=2,
        )

    def _run(self, program: Program, stop: threading.Event) -> Result:
        try:
            # a program may leave folders that nobody may enter: TemporaryDirectory gives itself the right to
            with tempfile.TemporaryDirectory(prefix="antipasto-program-", ignore_cleanup_errors=True) as folder:
                return self._run_in(folder, program, stop)
        except OSError as error:  # no disk, memory or descriptor to be had
            raise SandboxError(f"A program could not be run: {error}.") from error

    def _run_in(self, folder: str, program: Program, stop: threading.Event) -> Result:
        for name, content in program.files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(as_bytes(content, name))
            path.chmod(0o755)
        with tempfile.TemporaryFile() as stdin, opened(folder) as left, opened("/proc") as proc:
            stdin.write(as_bytes(program.stdin, "stdin"))
            stdin.seek(0)
            with subprocess.Popen(
                [*rlimits(self.limits, processes=None, file_bytes=self.limits.file_bytes), *program.argv],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment(folder, self.path),
                start_new_session=True,
            ) as process:
                seen = watch(
                    process,
                    self.limits,
                    look=lambda: use(proc, numbers_in(proc), session=process.pid),
                    kill=partial(_kill_group, process.pid),
                    stop=stop,
                )
            files, refused = read_left(left, program.keep, self.limits.output_bytes)
        return seen.result(files, refused)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it is gone; it is another user's, by a setuid program
        os.killpg(leader, signal.SIGKILL)
