"""What was measured of one decoder: for the base and for each rule, a verdict on each property.

A verdict is one of
  "exact", "float32"   it holds in float64 up to 1e-10, or up to what a model rounds to float32 inside itself
  "uncached: ..."      of the adapted model: peftc says why it keeps no cache, and `generate` does without
  "stated: ..."        of the adapted model: peftc says in what calls it does not hold, and why it cannot
  "lacks: ..."         of the base: transformers' own model does not have it, so it is asked of no adapted one
  "fails: ..."         of an adapted model: the base has it and the adapted model does not
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PROPERTIES = ("cached", "left", "right", "sdpa", "causal", "greedy")
"""Cached steps equal the full forward; rows padded at the left, and at the right, equal the row alone; fused attention
equals the spelled-out one; no output depends on a later token; greedy generation writes the tokens of an uncached
loop."""

HOLDS = ("exact", "float32")


@dataclass(slots=True)
class Record:
    """A row of the decoder table. `stopped` says what ended the measurement before a base or a rule could be tried."""

    family: str
    head: str
    model: str = ""
    dtype: str = ""
    base: dict[str, str] = field(default_factory=dict)
    rules: dict[str, dict[str, str]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    """By "build", "trace" or a rule's name."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}:{self.head}"

    @property
    def failures(self) -> list[str]:
        """Each property that the base has and an adapted model has not."""
        found = [
            f"{rule} {name}: {verdict}"
            for rule, verdicts in self.rules.items()
            for name, verdict in verdicts.items()
            if verdict.startswith("fails")
        ]
        stopped = {what: why for what, why in self.stopped.items() if what not in ("build", "trace", *self.refused)}
        return found + [f"{what}: {why}" for what, why in stopped.items()]

    @property
    def refused(self) -> dict[str, str]:
        """Rules that ask for a value which this model's attention does not have, with what peftc says of it."""
        return {what: why for what, why in self.stopped.items() if why.startswith("E004 ")}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Record:
        return cls(**raw)


def totals(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """For each property: bases that have it, and adapted models of those bases that have it, lack it with a word of
    peftc's own, or break it.
    """
    rows = list(records)
    found = {"subjects": {
        "all": len(rows),
        "built": sum("build" not in row.stopped for row in rows),
        "traced": sum(bool(row.rules) for row in rows),
        "with a failure": sum(bool(row.failures) for row in rows),
        "rules refused": sum(len(row.refused) for row in rows),
    }}  # fmt: skip
    for name in PROPERTIES:
        verdicts = [(row, rules[name]) for row in rows for rules in row.rules.values() if name in rules]
        found[name] = {
            "bases": sum(row.base.get(name) in HOLDS for row in rows if row.rules),
            "lacked by the base": sum(row.base.get(name, "").startswith("lacks") for row in rows if row.rules),
            "adapted": len(verdicts),
            "exact": sum(verdict == "exact" for _, verdict in verdicts),
            "float32": sum(verdict == "float32" for _, verdict in verdicts),
            "uncached": sum(verdict.startswith("uncached") for _, verdict in verdicts),
            "stated": sum(verdict.startswith("stated") for _, verdict in verdicts),
            "fails": sum(verdict.startswith("fails") for _, verdict in verdicts),
        }
    return found
