"""The family table: what was measured of each model type, shipped as `families.json`, and as text.

table().records["llama"].rules["mam"]       # "onnx"
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import did_you_mean, fail
from peftc.survey.causes import cause, told
from peftc.survey.record import RULES, Record
from peftc.survey.totals import lines, totals

if TYPE_CHECKING:
    from rich.console import Console

FILE = "families.json"


@dataclass(frozen=True, slots=True)
class FamilyTable:
    """Records by family, and the versions of packages they were measured with."""

    versions: dict[str, str]
    records: dict[str, Record]

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a file."""
        return {"versions": self.versions, "families": [record.to_json() for record in self.records.values()]}

    def shown(self) -> dict[str, Any]:
        """As it is printed: with the totals, and each reason under its cause."""
        document = self.to_json()
        for entry in document["families"]:
            entry["causes"] = [cause(reason) for reason in entry["reasons"]]
        return {**document, "totals": totals(self.records.values()).to_json()}

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
    """A line for each family, then the totals."""
    from rich.markup import escape
    from rich.table import Table

    if not console.is_terminal:
        console.width = 1000  # cuts no line
    rows = Table(box=None, pad_edge=False)
    for column in ("family", "built", "traced", "attention", "ffn", *RULES, "reason"):
        rows.add_column(column, style="bold" if column == "family" else "", no_wrap=column != "reason", overflow="fold")
    for record in shown.records.values():
        rows.add_row(*(escape(cell) for cell in _cells(record)))
    console.print(rows)
    for line in lines(totals(shown.records.values())):
        console.print(escape(line))
    console.print("measured with " + ", ".join(f"{name} {number}" for name, number in shown.versions.items()))


def _cells(record: Record) -> list[str]:
    counts = [_count(record, kind) for kind in ("attention", "ffn")]
    rules = [record.rules.get(rule, "-") for rule in RULES]
    yes = ["yes" if answer else "no" for answer in (record.built, record.traced)]
    return [record.family, *yes, *counts, *rules, "; ".join([*map(told, record.reasons), *record.notes])]


def _count(record: Record, kind: str) -> str:
    return f"{record.found[kind]}/{record.expected[kind]}" if record.traced else "-"
