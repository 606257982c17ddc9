"""Many model types, each in a process of its own with a bound on time and memory: one that misbehaves ends alone.

for record in sweep(every_family(), seconds=90):
    print(record.family, record.traced)
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from peftc.survey.record import Record

MEMORY = 12 * 2**30
"""Address space of one measurement, bytes: torch alone maps about four gigabytes."""

FEW = 3
"""So many families are measured sooner than the server is warm."""


def every_family() -> list[str]:
    """The model types for which transformers has a model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


def sweep(families: Iterable[str], *, seconds: int = 90, numbers: bool = True, onnx: bool = False) -> Iterator[Record]:
    """Measure each in turn. One that ends early has what it knew until then, and the reason."""
    families = list(families)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peftc.survey.warm" if len(families) > FEW else "peftc.survey.measure"])
    for family in families:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, family, numbers, onnx), daemon=True)
        process.start()
        sender.close()
        yield _collect(receiver, process, Record(family), seconds)


def _collect(receiver: Connection, process: BaseProcess, record: Record, seconds: int) -> Record:
    """The last record that the process sent; it is killed when the time is up."""
    import time

    end, done = time.monotonic() + seconds, False
    while not done:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            record.reasons.append(f"not done after {seconds} s")
            break
        try:
            raw, done = receiver.recv()
        except EOFError:
            process.join(5)
            record.reasons.append(
                f"the process ended with code {process.exitcode}: out of memory, or a crash in native code"
            )
            break
        record = Record.from_json(raw)
    if process.is_alive() and not done:
        process.kill()
    process.join(5)
    receiver.close()
    return record


def _work(sender: Connection, family: str, numbers: bool, onnx: bool) -> None:
    from peftc.frontend.trace import quiet
    from peftc.survey.measure import measure

    _silence()
    os.environ["PEFTC_CACHE"] = "off"  # hundreds of traces that nobody asks for again
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with quiet():
        record = measure(family, numbers=numbers, onnx=onnx, watch=lambda r: sender.send((r.to_json(), False)))
    sender.send((record.to_json(), True))


def _silence() -> None:
    """Models print while they are built; nothing of that is for the reader of a table."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
