"""Every decoder measured in a process of its own, with bounds on time and memory: one that misbehaves ends alone."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from decoding.record import Record
from peftc.survey.apart import apart, confine

MEMORY = 14 * 2**30
"""Address space of one measurement, bytes: torch alone maps about four gigabytes."""


def sweep(subjects: Iterable[tuple[str, str]], *, seconds: float = 200) -> Iterator[Record]:
    """Measure each (model type, head) in turn. One that ends early has what it knew until then, and the reason."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # the server knows no path of this process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["decoding.warm"])
    for family, head in subjects:
        known = [Record(family, head)]

        def heard(document: Any, known: list[Record] = known) -> None:
            known.append(Record.from_json(document))

        reason = apart(context, _work, (family, head), heard, seconds=seconds)
        if reason is not None:
            known[-1].stopped["time" if reason.startswith("not done") else "memory"] = reason
        yield known[-1]


def _work(sender: Connection, family: str, head: str) -> None:
    import warnings

    import torch

    from decoding.measure import measure

    confine(MEMORY)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = measure(family, head, lambda known: sender.send((known.to_json(), False)))
    sender.send((record.to_json(), True))
