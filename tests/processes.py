"""Several processes at once: that begin together, or that talk to each other."""

from __future__ import annotations

import faulthandler
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def at_once(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call the target in a process for each; it waits for ``start``, and puts one answer into ``results``."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(len(arguments)), context.Queue()
    workers = [context.Process(target=target, args=(*each, start, results)) for each in arguments]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join()
    return answers


@contextmanager
def process_group(rank: int, folder: str) -> Iterator[None]:
    """As one of two. What holds the group must be gone at the end: else joining gloo's threads may never return."""
    faulthandler.dump_traceback_later(200, exit=True)  # where it stands, if one process waits for ever
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/rendezvous", 2)  # a file: a free port may be taken until it is used
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
