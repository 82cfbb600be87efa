"""Somebody else's code, run in the middle of a training run that must not notice it.

    with unchanged(): …                  default dtype and device, grad mode and working directory are put back
    with unchanged(draws=False): …       and so are the random generators of Python, NumPy and torch: what was drawn was not
    copies(rows)                         what it may write into
    awaited(answers)                     what an async function returns in the end

A reward function belongs to the training run, so its draws count, as in TRL. A detector, an oracle and a probe only look.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import functools
import os
import random
import threading
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any


@contextmanager
def unchanged(*, draws: bool = True) -> Iterator[None]:
    """Context: what the process had set before is set again after, also after an exception.

    Args:
        draws: whether what is drawn in it from the global random generators is drawn for good.
    """
    import torch  # here and below: a task's name is checked without loading them

    dtype, grad, folder = torch.get_default_dtype(), torch.is_grad_enabled(), Path.cwd()
    device = torch.get_default_device()
    try:
        with nullcontext() if draws else _generators_kept():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_default_device() != device:  # one that is set costs something in every call of torch, the CPU too
            torch.set_default_device(None if device.type == "cpu" else device)
        os.chdir(folder)


@contextmanager
def _generators_kept() -> Iterator[None]:
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def copies(values: Iterable[Any]) -> list[Any]:
    """Deep copies, one entry each; of what cannot be copied, such as a client or a lock, itself."""
    values, made = list(values), dict[int, Any]()
    for value in values:
        if id(value) not in made:  # all rollouts of a prompt have the same row
            try:
                made[id(value)] = copy.deepcopy(value)
            except Exception:  # deepcopy calls methods of the value, which raise whatever they like
                made[id(value)] = value
    return [made[id(value)] for value in values]


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, as clients that a function keeps belong to one; on a thread, as the caller may have its own."""
    loop, ended = asyncio.new_event_loop(), threading.Event()

    def run() -> None:
        while not ended.is_set():
            with suppress(SystemExit, KeyboardInterrupt):  # they end the loop, and are the task's result as well
                loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    atexit.register(end)
    return loop


def awaited(values: Awaitable[Any]) -> Any:
    """What an ``async`` function returns in the end; raises what it raises, `SystemExit` too."""

    async def wait() -> Any:
        return await values

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop()).result()
