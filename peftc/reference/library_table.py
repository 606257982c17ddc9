"""The table of the library: what each rule is, and what was measured of it.

The four columns of He et al. (2022) are read off the rule. The measured ones come from `rules/measured.json`, which
`make library` writes: trained parameters and folds on all-MiniLM-L6-v2, and the largest differences that the reference
tests have found. A rule of another package has no measurements.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from peftc.lang.rule import Rule

FILE = "measured.json"


@dataclass(frozen=True, slots=True)
class Reference:
    """What a rule was compared with, and the largest differences found, all within `tolerance`."""

    to: str
    tolerance: float
    differences: dict[str, float]
    """By what was compared: outputs, weights, gradients."""

    @property
    def largest(self) -> float:
        return max(self.differences.values())


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one rule; `refused` says why it does not apply to MiniLM, with the code."""

    percent: float | None = None
    folds: dict[str, int] = field(default_factory=dict)
    """How many places end as merged, widened, constant, kept."""
    refused: str = ""
    references: tuple[Reference, ...] = ()

    def to_json(self) -> dict[str, Any]:
        references = [{"to": r.to, "tolerance": r.tolerance, **r.differences} for r in self.references]
        found: dict[str, Any] = {"percent": self.percent, "folds": self.folds, "references": references}
        return found | ({"refused": self.refused} if self.refused else {})

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Measured:
        references = [dict(entry) for entry in document["references"]]
        read = tuple(Reference(entry.pop("to"), entry.pop("tolerance"), entry) for entry in references)
        return Measured(document["percent"], document["folds"], document.get("refused", ""), read)


@lru_cache
def measured() -> dict[str, Measured]:
    """The measurements that are shipped, by rule."""
    text = importlib.resources.files("peftc.rules").joinpath(FILE).read_text(encoding="utf-8")
    return {name: Measured.from_json(entry) for name, entry in json.loads(text)["rules"].items()}


def dimensions(rule: Rule) -> dict[str, str]:
    """What is modified, the insertion, the form and the composition, those of several rows one after the other."""
    deltas = [d for d in rule.deltas if d.value is None]
    rows = {
        "modify": [f"{', '.join(d.at)}.{', '.join(d.modify)}" for d in deltas],
        "insert": ["from" if d.sources else d.insert for d in deltas],
        "form": [d.form.name or "(inline)" for d in deltas],
        "compose": [d.compose.text for d in deltas],
    }
    if rule.train and not rule.deltas:
        rows["modify"] = [f"train {glob.pattern}" for glob in rule.train]
    return {key: "; ".join(dict.fromkeys(values)) or "-" for key, values in rows.items()}


def entry(name: str, rule: Rule, origin: str) -> dict[str, Any]:
    """A rule of the library as JSON."""
    found = measured().get(name)
    head = {"name": name, "doc": rule.doc, "paper": rule.paper, "hyper": rule.values, "from": origin}
    return {**head, **dimensions(rule), "measured": None if found is None else found.to_json()}


_COLUMNS = (
    "rule", "what it is", "paper", "modify", "insert", "form", "compose", "trains", "folds", "held to", "differs by",
    "hyperparameters",
)  # fmt: skip
_NARROW = ("rule", "paper", "modify", "insert", "form", "compose", "trains", "folds", "differs by")
"""The columns of a terminal, where a line is short."""


def render(console: Console, found: Mapping[str, Rule], origins: Mapping[str, str]) -> None:
    """A line for each rule, with the package it is from where some are not the library's; a pipe gets every column."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    extended = len({*origins.values()}) > 1
    columns = [*(_NARROW if console.is_terminal else _COLUMNS), *(["from"] if extended else [])]
    if not console.is_terminal:
        console.width = 1000  # cuts no line
    for column in columns:
        whole = column in ("rule", "trains", "differs by") or not console.is_terminal
        table.add_column(column, style="bold" if column == "rule" else "", no_wrap=whole, overflow="fold")
    for name, rule in found.items():
        cells = {**_cells(name, rule), "from": origins[name]}
        table.add_row(*(cells[column] for column in columns))
    console.print(table)


def _cells(name: str, rule: Rule) -> dict[str, str]:
    from rich.markup import escape

    found = measured().get(name, Measured())
    ordered = sorted(found.references, key=lambda reference: not reference.to.startswith("peft"))
    first = ordered[0] if ordered else None
    cells = {
        "rule": name,
        "what it is": " ".join(rule.doc.split()),
        "paper": rule.paper,
        **dimensions(rule),
        "trains": "-" if found.percent is None else f"{found.percent:.2f} %",
        "folds": ", ".join(f"{result} {count}" for result, count in found.folds.items()) or found.refused or "-",
        "held to": "-" if first is None else first.to,
        "differs by": "-" if first is None else f"{first.largest:.0e}",
        "hyperparameters": " ".join(f"{hyper}={said.shown}" for hyper, said in rule.hyper.items()),
    }
    return {column: escape(text) for column, text in cells.items()}
