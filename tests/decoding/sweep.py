"""Every decoder measured in a process of its own, with bounds on time and memory: one that misbehaves ends alone."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from decoding.record import Record

MEMORY = 14 * 2**30
"""Address space of one measurement, bytes: torch alone maps about four gigabytes."""


def sweep(subjects: Iterable[tuple[str, str]], *, seconds: float = 200) -> Iterator[Record]:
    """Measure each (model type, head) in turn. One that ends early has what it knew until then, and the reason."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # the server knows no path of this process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["decoding.warm"])
    for family, head in subjects:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, family, head), daemon=True)
        process.start()
        sender.close()
        yield _collect(receiver, process, Record(family, head), seconds)


def _collect(receiver: Connection, process: BaseProcess, record: Record, seconds: float) -> Record:
    """The last record that the process sent; it is killed when the time is up."""
    end, done = time.monotonic() + seconds, False
    while not done:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            record.stopped["time"] = f"not done after {seconds} s"
            break
        try:
            raw, done = receiver.recv()
        except EOFError:
            process.join(5)
            record.stopped["memory"] = f"the process ended with code {process.exitcode}"
            break
        record = Record.from_json(raw)
    if process.is_alive() and not done:
        process.kill()
    process.join(5)
    receiver.close()
    return record


def _work(sender: Connection, family: str, head: str) -> None:
    import warnings

    import torch

    from decoding.measure import measure

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.environ["PEFTC_CACHE"] = "off"  # hundreds of traces that nobody asks for again
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = measure(family, head, lambda known: sender.send((known.to_json(), False)))
    sender.send((record.to_json(), True))
