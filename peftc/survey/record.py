"""What was measured of one model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

RULES: Mapping[str, Mapping[str, object]] = {
    "mam": {"l": 3, "r": 8, "s": 2.0},
    "lora": {"r": 2},
    "houlsby": {"r": 8},
}
"""The rules that are tried, with small sizes: one over attention and FFN, one on weights, one on outputs."""

KINDS = ("attention", "ffn")
STEPS = ("applies", "identity", "learns", "onnx")
Step = str
"""How far a rule gets: "" not tried, "applies", "identity" (equals the base at the start), "learns" (a gradient for
every delta), "onnx" (equal in onnxruntime too)."""


@dataclass(slots=True)
class Record:
    """A row of the family table. `expected` counts come from class names, `found` ones from the finders."""

    family: str
    model: str = ""
    built: bool = False
    traced: bool = False
    inputs: list[str] = field(default_factory=list)
    expected: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    rules: dict[str, Step] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    """Each miss in words."""
    notes: list[str] = field(default_factory=list)
    """What is no miss and still to be known: a trace that holds for one length only."""
    full: bool = False
    """Whether rules were asked for, and ONNX; a row of sites alone says nothing about either."""
    measured: str = ""
    """When, in UTC."""
    seconds: float = 0.0

    def right(self, kind: str) -> bool:
        """Whether as many sites were found as the class names say."""
        return self.traced and self.found.get(kind, 0) == self.expected.get(kind, 0)

    def reaches(self, rule: str, step: Step) -> bool:
        """Whether a rule gets at least so far."""
        reached = self.rules.get(rule, "")
        return reached in STEPS and STEPS.index(reached) >= STEPS.index(step)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Record:
        return cls(**raw)
