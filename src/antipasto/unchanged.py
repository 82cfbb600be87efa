"""Call a user's function in the middle of training without side effects on the training run.

    with unchanged(): …                  restores default dtype and device, grad mode and working directory
    with unchanged(draws=False): …       also restores the random generators of Python, NumPy and torch
    copies(rows)                         copies that the function may modify
    awaited(answers)                     the result of an async function

A reward function is part of training, so its random draws count, as in TRL. Those of a detector, an oracle or a probe do not.
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
    """Context manager that restores the process's settings at the end, also after an exception.

    Args:
        draws: whether random draws advance the global generators; if False, their states are restored too.
    """
    import torch  # here and below: a task's name is checked before torch is loaded

    dtype, grad, folder = torch.get_default_dtype(), torch.is_grad_enabled(), Path.cwd()
    device = torch.get_default_device()
    try:
        with nullcontext() if draws else _generators_kept():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_default_device() != device:  # a default device, even the CPU, slows down every call of torch
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
    """Deep-copy each value. A value that cannot be copied, such as a client or a lock, is returned itself."""
    values, made = list(values), dict[int, Any]()
    for value in values:
        if id(value) not in made:  # all rollouts of a prompt share a row
            try:
                made[id(value)] = copy.deepcopy(value)
            except Exception:  # deepcopy calls methods of the value, which may raise anything
                made[id(value)] = value
    return [made[id(value)] for value in values]


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One event loop for all calls, since clients belong to a loop. It runs in a thread: the caller may have its own loop."""
    loop, ended = asyncio.new_event_loop(), threading.Event()

    def run() -> None:
        while not ended.is_set():
            with suppress(SystemExit, KeyboardInterrupt):  # they stop the loop; the caller gets them as the result
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
    """Wait for an awaitable and return its result. Raises what it raises, including `SystemExit`."""

    async def wait() -> Any:
        return await values

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop()).result()
