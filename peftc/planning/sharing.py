"""Sharing: deltas at several calls of one module, which have one set of parameters between them (ALBERT's layers).

shared(plan)[0].describe()    # "lora has one set of parameters for the 12 calls of encoder.layer.attention"
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Shared:
    """A delta at `calls` calls of the module at `path`, once for each such module."""

    delta: str
    path: str
    calls: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        return f"{self.delta} has one set of parameters for the {self.calls} calls of {self.path}"


def shared(plan: Plan) -> list[Shared]:
    """The modules that are called several times, by the deltas with parameters that those calls share."""
    found: dict[tuple[str, str, tuple[str, ...]], set[int]] = {}
    for edit in plan.edits:
        params = {param.name: param for param in (*edit.delta.form.params, *edit.delta.params)}
        names = tuple(p.name for key, p in edit.parameters.items() if p is not None and params[key].share == "site")
        if names:
            found.setdefault((edit.delta.name, edit.site.path, names), set()).add(id(edit.site))
    calls = {(delta, path): len(sites) for (delta, path, _), sites in found.items() if len(sites) > 1}
    return [Shared(delta, path, count) for (delta, path), count in calls.items()]
