"""Names of the axes whose size a trace leaves open: B for the batch, S for the sequence, T for a second one.

>>> shown(node.meta["val"].shape, axis_names(program))
['B', 'S', '384']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peftc.ir.program import Program

_SEQUENCES = ("S", "T")


def axis_names(program: Program) -> dict[str, str]:
    """The symbols of the trace, such as s72, each with its name: the first axes of the inputs, then the second ones."""
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in program.placeholders("input").values()]
    found: dict[str, str] = {}
    for shape in shapes:
        if len(shape) > 0 and not isinstance(shape[0], int):
            found.setdefault(str(shape[0]), "B")
    seconds = dict.fromkeys(str(shape[1]) for shape in shapes if len(shape) > 1 and not isinstance(shape[1], int))
    free = [symbol for symbol in seconds if symbol not in found]
    return found | dict(zip(free, _SEQUENCES, strict=False))


def shown(shape: Iterable[Any], names: Mapping[str, str]) -> list[str]:
    """Sizes as words, the symbols of the trace by their names: `384`, `B`, `B*S`."""
    return [re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), str(size)) for size in shape]
