"""How a delta parameter starts: a random draw or a constant by name, or a recipe over frozen tensors of the base.

A recipe is an expression that has met a site: it knows the numbers its names stand for, which stored tensors `weight`
and `h` are, and the parameters above it. Nothing here holds a value; `peftc.runtime.init` computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftc.lang.rule import Expr, Scalar

if TYPE_CHECKING:
    from peftc.diagnostics import Span
    from peftc.ir.program import DeltaParameter


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the base by its state-dict name; `shape` is that of what is read.

    `transposed` says that it is stored as [in, out]; `rows` are those of the canonical [out, in] that belong to the
    tap, where q, k and v are one projection (None: all).
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter lies in the state dict: owner.peftc.row[_rank][.tap][.middle].name."""

    owner: str
    row: str
    rank: int = 0
    tap: str = ""
    """The tap, where the row modifies several."""
    middle: str = ""

    def name(self, parameter: str) -> str:
        row = self.row + (f"_{self.rank}" if self.rank else "")
        return ".".join(part for part in (self.owner, "peftc", row, self.tap, self.middle, parameter) if part)


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor of a stored delta directory, at the same site; `slot` has the tap that a row of several taps needs.

    `hyper` is the name that --set gives the directory under, `place` the directory, or None where it was not given.
    """

    hyper: str
    place: str | None
    slot: Slot
    parameter: str
    shape: tuple[int, ...]
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """An expression under `init`, at one site."""

    expr: Expr
    site: str
    """The site in words, for messages."""
    statics: Mapping[str, Scalar] = field(default_factory=dict)
    frozen: Mapping[str, Stored] = field(default_factory=dict)
    above: Mapping[str, DeltaParameter | None] = field(default_factory=dict)
    lets: Mapping[str, Expr] = field(default_factory=dict)
    saved: Mapping[str, Saved] = field(default_factory=dict)
    """What each call of `load` reads, by its text."""

    @property
    def copied(self) -> DeltaParameter | None:
        """The parameter whose value this is, where the expression is its bare name."""
        found = self.above.get(self.expr.text)
        return found if self.expr.text not in self.statics else None


@dataclass(frozen=True, slots=True)
class Init:
    """An entry of `peftc.lang.ops.INITS` with its numbers, or a `recipe`."""

    name: str
    arguments: tuple[float, ...] = ()
    recipe: Recipe | None = None

    @property
    def is_zero(self) -> bool:
        return self.name == "zeros" or (self.name == "constant" and self.arguments == (0.0,))
