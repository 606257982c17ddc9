"""Reach: modules whose weights nothing in a trace reads, such as the tower for images of a model that was given text.

unreached(program).describe()   # "input_ids, attention_mask reach nothing of model.vision_tower (6,528 parameters)"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.ir.program import Program


@dataclass(frozen=True, slots=True)
class Unreached:
    """The outermost modules that a trace made with `inputs` reads no weight of, and how many parameters they have."""

    inputs: tuple[str, ...]
    modules: tuple[str, ...]
    parameters: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "inputs": list(self.inputs), "modules": list(self.modules)}

    def describe(self) -> str:
        shown = ", ".join(self.modules[:3]) + (f" and {len(self.modules) - 3} more" if len(self.modules) > 3 else "")
        return (
            f"{', '.join(self.inputs)} reach nothing of {shown} ({self.parameters:,} parameters): no delta goes there"
        )


def unreached(program: Program) -> tuple[Unreached, ...]:
    """One entry where the trace leaves modules aside, none where it reads from all of them."""
    placeholders = program.placeholders("parameter")
    read = {program.tied.get(name, name) for name, node in placeholders.items() if node.users}
    unread = {
        name: node
        for name, node in placeholders.items()
        if program.tied.get(name, name) not in read and name not in program.delta_parameters
    }
    modules = _outermost(unread, [name for name in placeholders if name not in unread])
    if not modules:
        return ()
    count = sum(int(node.meta["val"].numel()) for name, node in unread.items() if name not in program.tied)
    return (Unreached(tuple(program.placeholders("input")), modules, count),)


def _outermost(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The shortest paths of modules that hold some of `names` and none of `others`."""
    kept = {outer for name in others for outer in _around(name)}
    found = (next((outer for outer in _around(name) if outer not in kept), None) for name in names)
    return tuple(dict.fromkeys(path for path in found if path is not None))


def _around(name: str) -> list[str]:
    """The modules around a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: size + 1]) for size in range(len(parts))]
