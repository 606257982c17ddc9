"""Shapes with their names where the numbers are known: what an error says of an operand when there is a model.

    x is [B, S, d_in=384] but W_down is [d_in=384, r=8]

The names come from the walk that checks a rule without a model; a size whose name does not give the number at hand is
shown as the number alone.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftc.lang.rule import Delta, Expr, Hyper, Scalar
from peftc.lang.shapes.check import row_walk, walk_body
from peftc.lang.shapes.places import places
from peftc.lang.shapes.polynomial import constant, substitute
from peftc.lang.shapes.terms import Shape, Size, Static
from peftc.lang.shapes.walk import Walk


@dataclass(frozen=True, slots=True)
class Named:
    """The walk of a row at one place, and the numbers of its names there."""

    walk: Walk
    numbers: Mapping[str, int]

    def shape(self, sizes: Sequence[str], expr: Expr | None, node: ast.expr | None) -> str:
        """The shape `sizes` of the value that `node` of `expr` has; without them, of h."""
        value = self.walk.env.get("h")
        if expr is not None and node is not None:
            previous, self.walk.expr = self.walk.expr, expr
            value = self.walk.visit(node)
            self.walk.expr = previous
        symbolic = value.last(len(sizes)) if isinstance(value, Shape) else (None,) * len(sizes)
        return f"[{', '.join(self._size(size, name) for size, name in zip(sizes, symbolic, strict=True))}]"

    def _size(self, size: str, symbolic: Size) -> str:
        if symbolic is None or symbolic.value is not None or not size.isdigit():
            return size
        names = {name: constant(number) for name, number in self.numbers.items()}
        number = None if symbolic.atoms else substitute(symbolic, names)
        if number is None or number.value != int(size):
            return size
        return f"{str(symbolic).replace(' ', '')}={size}"


def named(
    delta: Delta, hypers: Mapping[str, Hyper], site: str, tap: str, statics: Mapping[str, Scalar]
) -> Named | None:
    """The names at one tap of a site of that kind; None where nothing is known of such a place."""
    place = next((place for place in places(delta) if (place.site, place.tap) == (site, tap)), None)
    if place is None:
        return None
    walk = row_walk(delta, hypers, place)
    for name, value in statics.items():
        known = walk.env.get(name)
        if isinstance(known, Static):
            walk.env[name] = Static(known.size, value, known=True)
    walk_body(walk, delta)
    return Named(walk, {name: value for name, value in statics.items() if type(value) is int})
