"""What `peftc patterns` lists: the patterns of the library, and the ops that patterns are written with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftc.diagnostics import Diagnostic, PeftcError
from peftc.lang.extensions import LIBRARY
from peftc.lang.library import catalogue, load_pattern, pattern_names
from peftc.patterns.ops import OPERATORS, PATTERN_OPS, WORDS


@dataclass(frozen=True, slots=True)
class Row:
    """One line: `more` is what JSON says beside the name and the doc."""

    name: str
    doc: str
    text: str
    more: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "doc": self.doc, **self.more}


def listed_patterns() -> tuple[list[Row], list[Diagnostic]]:
    """The patterns of the library and of other packages, and what is wrong with those that do not load."""
    known = catalogue("patterns")
    rows: list[Row] = []
    problems = [*known.problems, *known.clashes("pattern")]
    for name in pattern_names():
        try:
            pattern = load_pattern(name)
        except PeftcError as error:
            problems += error.diagnostics
            continue
        if pattern is not None:
            doc, taps, origin = " ".join(pattern.doc.split()), list(pattern.taps), known.origin(name)
            text = f"{doc} Taps: {' '.join(taps)}" + ("" if origin == LIBRARY else f" ({origin})")
            rows.append(Row(name, doc, text, {"taps": taps, "dims": list(pattern.dims), "from": origin}))
    return rows, problems


def listed_ops() -> list[Row]:
    """The ops of patterns, and the words that look like ops."""
    symbols = {name: symbol for symbol, name in OPERATORS.items()}
    rows = [
        Row(op.name, op.doc, op.doc, {"operands": list(op.arity), "operator": symbols.get(op.name)})
        for op in PATTERN_OPS.values()
    ]
    return rows + [Row(name, doc, doc, {"operands": None, "operator": None}) for name, doc in WORDS.items()]
