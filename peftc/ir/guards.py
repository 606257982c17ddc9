"""What sizes a call must have for a trace to hold, where a loop over chunks of the tokens was written out.

    guards = guards_of(program, inputs)     # ceil(sequence / 64) equals 1: chunks of 64
    guards.broken({"sequence": 100})        # {"sequence"}

The tracer assumes such an equation when a loop asks how often it is to run, and keeps it beside the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peftc.ir.program import Program


@dataclass(frozen=True, slots=True)
class Guards:
    """Equations between an expression of sizes and a number; `axes` says which axis a symbol is."""

    equations: tuple[Any, ...]
    axes: Mapping[Any, str]
    _known: dict[tuple[tuple[str, int], ...], frozenset[str]] = field(default_factory=dict)

    @torch.compiler.disable
    def broken(self, sizes: Any) -> frozenset[str]:
        """The axes of the equations that do not hold for a call of these sizes, by the names of axes."""
        key = tuple(sorted(sizes.items()))
        if key not in self._known:
            values = {symbol: sizes[axis] for symbol, axis in self.axes.items() if axis in sizes}
            wrong = [equation for equation in self.equations if equation.subs(values) == False]  # noqa: E712
            self._known[key] = frozenset(self.axes[symbol] for equation in wrong for symbol in equation.free_symbols)
        return self._known[key]


def guards_of(program: Program, axes: Mapping[str, tuple[str | int, ...]]) -> Guards | None:
    """The equations that a fresh trace assumed of the named axes of its inputs; None where there are none.

    `axes` holds the axes of each input. Symbols that were found to be one are one here.
    """
    import sympy

    named: dict[Any, str] = {}
    for name, node in program.placeholders("input").items():
        value = node.meta.get("val")
        if name in axes and isinstance(value, torch.Tensor):
            for axis, size in zip(axes[name], value.shape, strict=True):
                if isinstance(axis, str) and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    named[size.node.expr] = axis
    shapes: Any = program.fake_mode.shape_env
    equal = [guard.expr for guard in shapes.guards if isinstance(guard.expr, sympy.Eq)] if shapes is not None else []
    pairs: list[Any] = [sorted((one.lhs, one.rhs), key=lambda side: side in named) for one in equal if _of_symbols(one)]
    same: Any = dict(pairs)  # the one that an input has stays
    found = {one.subs(same) for one in equal if one.rhs.is_Integer}
    kept = [one for one in found if one.free_symbols and one.free_symbols <= named.keys()]
    return Guards(tuple(kept), named) if kept else None


def _of_symbols(equation: Any) -> bool:
    return bool(equation.lhs.is_Symbol and equation.rhs.is_Symbol)
