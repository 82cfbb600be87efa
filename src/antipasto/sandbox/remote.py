"""Programs run by somebody's service: a function of yours that sends a program there, as a `Sandbox`.

    def call(program: Program, limits: Limits) -> Result:
        answer = requests.post(URL, json={...}, timeout=limits.wall_seconds + 10).json()
        return Result(answer["exit_code"], answer["limit"], base64.b64decode(answer["stdout"]), ...)

    sandbox = Remote(call, Limits(wall_seconds=5))

How well programs are isolated, and that the limits are kept, is the service's to say. The function is called from several
threads at once; an exception of its own comes out of `run`. A call in flight is not broken off: after Ctrl-C it is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from antipasto.sandbox.pool import Pooled
from antipasto.sandbox.protocol import Limits, Program, Result, SandboxError


class Remote(Pooled):
    """A function that runs programs elsewhere, as a sandbox.

    Args:
        call: program, limits → result.
        limits: of each program, given to every call; by default `Limits`'.

    Example:
        >>> def call(program, limits):
        ...     return Result(0, None, b"ran " + program.argv[0].encode(), b"", False, False, 0.2)
        >>> Remote(call).run(Program(["true"])).stdout
        b'ran true'
    """

    def __init__(self, call: Callable[[Program, Limits], Result], limits: Limits | None = None) -> None:
        super().__init__(limits)
        if not callable(call):
            raise ValueError(f"call must be a function of a program and its limits, got {type(call).__name__}.")
        self.call = call

    def _run(self, program: Program, stop: threading.Event) -> Result:
        if stop.is_set():
            raise SandboxError("The sandbox was closed before a program ran in it.")
        result = self.call(program, self.limits)
        if not isinstance(result, Result):
            raise ValueError(f"call must return a Result, got {type(result).__name__}.")
        return result
