"""Overlaps: values of the graph that more than one delta changes, with the deltas in the order they are composed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.planning.plan import Edit, Plan


@dataclass(frozen=True, slots=True)
class Overlap:
    """Deltas that change one value, first to last, at `places` of the model."""

    deltas: tuple[str, ...]
    tap: str
    places: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"deltas": list(self.deltas), "tap": self.tap, "sites": list(self.places)}

    def describe(self) -> str:
        count = f"{len(self.places)} site" + ("" if len(self.places) == 1 else "s")
        return f"{', then '.join(self.deltas)} on {self.tap} at {count}"


def overlaps(plan: Plan) -> list[Overlap]:
    """The overlaps of a plan, those of the same deltas and taps together.

    A value can be a tap of several sites, such as `out` of an attention and of its last linear layer.
    """
    at_value: dict[Any, list[tuple[str, Edit]]] = {}
    for edit in plan.edits:
        for name, tap in edit.written:
            at_value.setdefault((tap.node, tap.user), []).append((name, edit))
    groups: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for edits in at_value.values():
        if len(edits) > 1:
            taps = dict.fromkeys(f"{edit.site.kind}.{name}" for name, edit in edits)
            key = tuple(edit.delta.name for _, edit in edits), " = ".join(taps)
            groups.setdefault(key, []).append(edits[0][1].site.path)
    return [Overlap(deltas, tap, tuple(places)) for (deltas, tap), places in groups.items()]
