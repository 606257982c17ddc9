"""The family table: what was measured of each model type, shipped as `families.json`, and as text.

table().records["llama"].rules["mam"]       # "onnx"
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import did_you_mean, fail
from peftc.survey.record import RULES, Record

if TYPE_CHECKING:
    from rich.console import Console

FILE = "families.json"


@dataclass(frozen=True, slots=True)
class FamilyTable:
    """Records by family, and the versions of packages they were measured with."""

    versions: dict[str, str]
    records: dict[str, Record]

    def to_json(self) -> dict[str, Any]:
        return {"versions": self.versions, "families": [record.to_json() for record in self.records.values()]}

    @staticmethod
    def from_json(document: dict[str, Any]) -> FamilyTable:
        read = [Record.from_json(entry) for entry in document["families"]]
        return FamilyTable(document["versions"], {record.family: record for record in read})


@lru_cache
def table() -> FamilyTable:
    """The table that is shipped; `python tests/survey.py` writes it."""
    text = importlib.resources.files("peftc.survey").joinpath(FILE).read_text(encoding="utf-8")
    return FamilyTable.from_json(json.loads(text))


def measured_anew(families: Sequence[str], *, seconds: int = 300) -> FamilyTable:
    """These families measured now, with everything. Raises `PeftcError` E032 for a model type that is unknown."""
    from importlib.metadata import version

    from peftc.survey.sweep import every_family, sweep

    known = every_family()
    for family in families:
        if family not in known:
            fail("E032", f"transformers has no model type `{family}`", help=did_you_mean(family, known))
    versions = {name: version(name) for name in ("torch", "transformers")}
    return FamilyTable(versions, {r.family: r for r in sweep(families, seconds=seconds, onnx=True)})


def render(console: Console, shown: FamilyTable) -> None:
    """A line for each family, then the sums."""
    from rich.markup import escape
    from rich.table import Table

    if not console.is_terminal:
        console.width = 1000  # cuts no line
    lines = Table(box=None, pad_edge=False)
    for column in ("family", "built", "traced", "attention", "ffn", *RULES, "reason"):
        lines.add_column(
            column, style="bold" if column == "family" else "", no_wrap=column != "reason", overflow="fold"
        )
    for record in shown.records.values():
        lines.add_row(*(escape(cell) for cell in _cells(record)))
    console.print(lines)
    console.print("; ".join(f"{what}: {count}" for what, count in sums(shown.records.values()).items()))
    console.print("measured with " + ", ".join(f"{name} {number}" for name, number in shown.versions.items()))


def _cells(record: Record) -> list[str]:
    counts = [_count(record, kind) for kind in ("attention", "ffn")]
    rules = [record.rules.get(rule, "-") for rule in RULES]
    yes = ["yes" if answer else "no" for answer in (record.built, record.traced)]
    return [record.family, *yes, *counts, *rules, "; ".join(record.reasons)]


def _count(record: Record, kind: str) -> str:
    return f"{record.found[kind]}/{record.expected[kind]}" if record.traced else "-"


def sums(records: Iterable[Record]) -> dict[str, int]:
    """How many families get how far; `right` counts those that have such blocks."""
    rows = list(records)
    traced = [record for record in rows if record.traced]
    found = {
        "families": len(rows),
        "built": sum(record.built for record in rows),
        "traced": len(traced),
    }
    for kind in ("attention", "ffn"):
        having = [record for record in traced if record.expected[kind]]
        found[f"with {kind}"] = len(having)
        found[f"{kind} right"] = sum(record.right(kind) for record in having)
    for rule in RULES:
        found[f"{rule} learns"] = sum(record.rules.get(rule) in ("learns", "onnx") for record in traced)
    found["onnx equal"] = sum("onnx" in record.rules.values() for record in traced)
    return found
