"""Gaps: layers of a stack where a delta that was not narrowed has no site, as in models that mix kinds of layers.

gaps(plan)[0].describe()    # "prefix is at layer 1 of the 3 of the decoder; the others have no attention"
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Gap:
    """The layers of one stack that a delta is at, where these are not all."""

    delta: str
    kinds: tuple[str, ...]
    stack: str
    layers: tuple[int, ...]
    count: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kinds": list(self.kinds), "layers": list(self.layers)}

    def describe(self) -> str:
        plural = "layer" if len(self.layers) == 1 else "layers"
        listed = ", ".join(str(layer) for layer in self.layers[:8]) + (", ..." if len(self.layers) > 8 else "")
        kinds = " or ".join(self.kinds)
        return (
            f"{self.delta} is at {plural} {listed} of the {self.count} of the {self.stack}; the others have no {kinds}"
        )


def gaps(plan: Plan) -> list[Gap]:
    """What the rows of a plan miss, for each stack in which a row that names no layers has sites in blocks."""
    found: list[Gap] = []
    for delta in plan.rule.deltas:
        where = delta.where
        if where.layers is not None or where.path or where.condition is not None:
            continue  # the rule says itself where it is not
        sites = [site for site in plan.sites_of(delta.name) if site.layer >= 0]
        for stack, tower in dict.fromkeys((site.stack, site.tower) for site in sites):
            own = [site for site in sites if (site.stack, site.tower) == (stack, tower)]
            layers = tuple(sorted({site.layer for site in own}))
            count = max(int(site.dims["layers"]) for site in own)
            if len(layers) < count:
                found.append(Gap(delta.name, tuple(delta.at), stack, layers, count))
    return found
