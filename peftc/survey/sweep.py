"""Many model types, each in a process of its own with a bound on time and memory: one that misbehaves ends alone.

for record in sweep(every_family(), seconds=90):
    print(record.family, record.traced)
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from peftc.survey.apart import apart, confine
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
        known = [Record(family)]

        def heard(document: Any, known: list[Record] = known) -> None:
            known.append(Record.from_json(document))

        reason = apart(context, _work, (family, numbers, onnx), heard, seconds=seconds)
        if reason is not None:
            known[-1].reasons.append(reason)
        yield known[-1]


def _work(sender: Connection, family: str, numbers: bool, onnx: bool) -> None:
    from peftc.frontend.trace import quiet
    from peftc.survey.measure import measure

    confine(MEMORY)
    with quiet():
        record = measure(family, numbers=numbers, onnx=onnx, watch=lambda r: sender.send((r.to_json(), False)))
    sender.send((record.to_json(), True))
