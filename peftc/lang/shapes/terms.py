"""Shapes as far as they are known, and when two sizes cannot be the same.

A size is a polynomial or None, "not known"; an *open* shape has axes in front that are not known: [.., d_in]. Sizes
with different names may be equal for some model or some value, so `Sizes.verdict` says how sure a difference is:

| verdict     | meaning                                                        | example                      |
|-------------|----------------------------------------------------------------|------------------------------|
| same        | equal for all values                                           | k * (d_in / k) and d_in      |
| maybe       | not known                                                      | d_model and d_in             |
| by chance   | equal as the hyperparameters stand, or where d_in is d_out     | r and m with both 8          |
| coincidence | equal for some value of a hyperparameter that nothing asks for | r and d_in, l and S          |
| never       | different for all values                                       | 2 * d_in and d_in; r=8 and 4 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from peftc.lang.rule import Scalar
from peftc.lang.shapes.polynomial import ONE, Polynomial, bounded, substitute

Size = Polynomial | None
Verdict = Literal["same", "maybe", "by chance", "coincidence", "never"]

AXES = ("B", "S", "T")
"""Batch, sequence, and the sequence that an attention reads, which is S in a self-attention."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a tensor; `open`: after unknown axes come `sizes`."""

    sizes: tuple[Size, ...] = ()
    open: bool = False

    def __str__(self) -> str:
        shown = ["?" if size is None else str(size) for size in self.sizes]
        return f"[{', '.join([*(['..'] if self.open else []), *shown])}]"

    def last(self, count: int) -> tuple[Size, ...]:
        """The last `count` sizes, None for those that are not known to exist."""
        found = self.sizes[max(0, len(self.sizes) - count) :]
        return (*[None] * (count - len(found)), *found)

    def lead(self, count: int) -> Shape:
        """The axes in front of the last `count`."""
        return Shape(self.sizes[: max(0, len(self.sizes) - count)], self.open)

    def then(self, *sizes: Size) -> Shape:
        return Shape((*self.sizes, *sizes), self.open)


UNKNOWN = Shape((), open=True)


@dataclass(frozen=True, slots=True)
class Static:
    """A number or word known when the graph is written: its size if it is a polynomial, its value if that is known."""

    size: Size = None
    value: Scalar = None
    known: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """A parameter whose `if` is false."""

    condition: str = ""


Value = Shape | Static | Absent | list["Value"]


class Misfit(Exception):  # noqa: N818 -- caught where it is raised, and told as a diagnostic
    """Operands that cannot fit; `operands` are positions of the arguments that disagree."""

    def __init__(self, reason: str = "", *operands: int, help: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.operands, self.help = reason, operands, help


@dataclass(slots=True)
class Sizes:
    """What is known of the names: `values` of hyperparameters, `aliases` of dimensions, which are `dims` of the site.

    `related` are names that the rule's own condition ties together; `sure_only` holds in a branch that may not be
    taken, where only what can never fit is told. `chances` gathers the pairs that fit by chance.
    """

    values: Mapping[str, Polynomial] = field(default_factory=dict)
    aliases: Mapping[str, Polynomial] = field(default_factory=dict)
    dims: frozenset[str] = frozenset()
    related: frozenset[str] = frozenset()
    sure_only: bool = False
    chances: list[tuple[Polynomial, Polynomial]] = field(default_factory=list)

    def verdict(self, a: Size, b: Size) -> Verdict:
        if a is None or b is None:
            return "maybe"
        symbolic = substitute(a - b, self.aliases)
        left = None if symbolic is None else substitute(symbolic, self.values)
        if symbolic is None or left is None:
            return "maybe"
        if not left.terms:
            return "by chance" if symbolic.terms and not symbolic.names & self.related else "same"
        if left.value is not None or (not left.atoms and _one_sign(left)):
            return "never"
        if left.atoms or left.names & self.related:
            return "maybe"
        return self._names_apart(a, b, symbolic)

    def _names_apart(self, a: Polynomial, b: Polynomial, symbolic: Polynomial) -> Verdict:
        """For a difference that is zero for some values of the names."""
        names = symbolic.names
        if names <= self.dims:
            return "by chance" if names == {"d_in", "d_out"} and _plain(a) and _plain(b) else "maybe"
        if names & {*AXES}:
            return "maybe" if names <= {"S", "T"} or not (_plain(a) and _plain(b)) else "coincidence"
        for one, other in ((a, b), (b, a)):
            hypers = one.names - self.dims
            if len(hypers) == 1 and hypers == one.names and other.names and other.names <= self.dims:
                return "coincidence"
        free = _plain(a) and _plain(b) and not names & (self.dims | self.values.keys())
        return "coincidence" if free else "maybe"

    def can_be_one(self, size: Size) -> bool:
        """Whether the axis may be one that broadcasts."""
        if size is None:
            return True
        number = substitute(size, self.values)
        if number is None or number.value is not None:
            return number is None or number.value == 1
        return bool(number.atoms) or bool(number.names - self.dims - {*AXES})

    def is_one(self, size: Size) -> bool:
        number = None if size is None else substitute(size, self.values)
        return number is not None and number.value == 1

    def more(self, a: Size, b: Size) -> bool:
        """Whether a is larger than b for all values."""
        left = None if a is None or b is None else substitute(a - b, {**self.aliases, **self.values})
        return left is not None and bool(left.terms) and not left.atoms and left.holds_of(lambda c: c > 0)

    def same(self, a: Size, b: Size) -> Size:
        """The size of an axis that both have. Raises `Misfit` where they cannot be equal."""
        found = self.verdict(a, b)
        if a is None or b is None or found == "same":
            return b if a is None else a
        if found == "never":
            raise Misfit(f"{self._valued(a)} and {self._valued(b)} differ")
        if found == "coincidence" and not self.sure_only:
            raise Misfit(f"{a} and {b} are equal by coincidence only")
        if found == "by chance" and not self.sure_only:
            self.chances.append((a, b))
        return a if found == "by chance" else None

    def _valued(self, size: Polynomial) -> str:
        """The size, with its number where hyperparameters give it one."""
        number = substitute(size, self.values)
        known = number is not None and number.value is not None and size.value is None
        return f"{size} = {number}" if known else str(size)

    def wide(self, a: Size, b: Size) -> Size:
        """The size of two axes that broadcast. Raises `Misfit` where they cannot."""
        for one, other in ((a, b), (b, a)):
            if self.is_one(one):
                return other
        if a is None or b is None:
            found = b if a is None else a
            return None if self.can_be_one(found) else found
        if self.verdict(a, b) == "coincidence" and (self.can_be_one(a) or self.can_be_one(b)):
            return None
        return self.same(a, b)

    def broadcast(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of tensors that are combined entry by entry. Raises `Misfit` with the positions of two of them."""
        found, widest = shapes[0], 0
        for position, shape in enumerate(shapes[1:], 1):
            count = max(len(found.sizes), len(shape.sizes))
            try:
                sizes = [self._pair(found, shape, place) for place in range(count, 0, -1)]
            except Misfit as misfit:
                raise Misfit(misfit.reason, widest, position) from None
            if len(shape.sizes) > len(found.sizes):
                widest = position
            found = Shape(tuple(sizes), found.open or shape.open)
        return found

    def _pair(self, one: Shape, other: Shape, place: int) -> Size:
        """The size at `place` axes from the end."""
        if place > len(one.sizes) and not one.open:
            return other.sizes[-place]
        if place > len(other.sizes) and not other.open:
            return one.sizes[-place]
        return self.wide(one.last(place)[0], other.last(place)[0])


def product(sizes: Sequence[Size]) -> Size:
    """The number of entries of axes; None where one is not known."""
    found: Size = ONE
    for size in sizes:
        found = None if found is None or size is None else bounded(found * size)
    return found


def _plain(found: Polynomial) -> bool:
    """Whether it is a number or a name alone."""
    return len(found.names) <= 1 and len(found.terms) == 1


def _one_sign(found: Polynomial) -> bool:
    return found.holds_of(lambda c: c > 0) or found.holds_of(lambda c: c < 0)
