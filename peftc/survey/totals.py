"""The sums of a family table, and its rate against the aim: nine in ten families that have such blocks.

A family counts as reached when every attention and FFN that its class names tell of is a site, and `mam` on it
applies, keeps the shapes of the base at its start, gives a gradient to every delta and is equal in onnxruntime.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from peftc.survey.causes import counted
from peftc.survey.record import KINDS, RULES, STEPS, Record

AIM = 0.9


@dataclass(frozen=True, slots=True)
class Part:
    """How many of those that could do."""

    count: int
    of: int

    def __str__(self) -> str:
        share = f" ({self.count / self.of:.1%})" if self.of else ""
        return f"{self.count} of {self.of}{share}"


@dataclass(frozen=True, slots=True)
class Totals:
    """How many families get how far."""

    families: int
    built: int
    traced: int
    sites: dict[str, Part]
    """By kind: those where every one is found, of those that have any. `both`: of those that have both."""
    rules: dict[str, dict[str, Part]]
    """By rule and step, of the traced families that have the blocks it works on and on which it was tried."""
    aim: Part
    causes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        rate = self.aim.count / self.aim.of if self.aim.of else None
        return {**asdict(self), "aim": {**asdict(self.aim), "rate": rate, "wanted": AIM}}


def totals(records: Collection[Record]) -> Totals:
    """Sums of these records."""
    traced = [record for record in records if record.traced]
    both = [record for record in traced if all(record.expected[kind] for kind in KINDS)]
    sites = {kind: _right([r for r in traced if r.expected[kind]], (kind,)) for kind in KINDS}
    sites["both"] = _right(both, KINDS)
    rules = {rule: _steps(rule, traced if rule == "lora" else both) for rule in RULES}
    tried = [record for record in both if record.full]
    reached = sum(all(map(record.right, KINDS)) and record.reaches("mam", "onnx") for record in tried)
    return Totals(
        families=len(records),
        built=sum(record.built for record in records),
        traced=len(traced),
        sites=sites,
        rules=rules,
        aim=Part(reached, len(tried)),
        causes=counted(records),
    )


def _right(having: list[Record], kinds: Collection[str]) -> Part:
    return Part(sum(all(map(record.right, kinds)) for record in having), len(having))


def _steps(rule: str, having: list[Record]) -> dict[str, Part]:
    """ONNX is tried for the first rule alone."""
    tried = [record for record in having if record.full and record.expected["attention"]]
    steps = STEPS if rule == next(iter(RULES)) else STEPS[:-1]
    return {step: Part(sum(record.reaches(rule, step) for record in tried), len(tried)) for step in steps}


def lines(found: Totals) -> list[str]:
    """What is printed below the table: the sums, then the causes of misses."""
    return [*sums(found), *(f"missed by {count}: {words}" for words, count in found.causes.items())]


def sums(found: Totals) -> list[str]:
    """The sums and the rate against the aim."""
    wide = {"applies": "applied", "identity": "identity", "learns": "learns", "onnx": "ONNX equal"}
    names = {"attention": "every attention found", "ffn": "every FFN found", "both": "both, where it has both"}
    return [
        f"{found.families} model types: {found.built} build, {found.traced} trace",
        *(f"{names[kind]}: {part}" for kind, part in found.sites.items()),
        *(
            f"{rule}: "
            + ", ".join(f"{wide[step]} {part.count}" for step, part in steps.items())
            + f", of {next(iter(steps.values())).of} tried"
            for rule, steps in found.rules.items()
        ),
        f"sites right and mam applied, learning and equal in ONNX: {found.aim}; the aim is {AIM:.0%}",
    ]
