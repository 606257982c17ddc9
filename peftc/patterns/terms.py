"""A pattern as a value: terms that graph nodes are compared with, each knowing its place in the file.

A term is a `Call` of an op, a `Piece` of a split value, the `Nearest` op of a kind upstream, a `Leaf` (a name that
stands for a value, or in capitals for a parameter), or a `Number`. Calls are compared by identity: a value that two
lines read is one term, and one node of the graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from peftc.diagnostics import Span
from peftc.lang.rule import Expr
from peftc.patterns.ops import OPERATORS, PatternOp

_SYMBOLS = {**{name: symbol for symbol, name in OPERATORS.items()}, "neg": "-"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a term stands: its text, the line it is a part of, its span in the file."""

    text: str
    line: str
    span: Span | None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """An op with operands; any of `ops` will do."""

    ops: tuple[PatternOp, ...]
    operands: tuple[Term, ...]
    place: Place

    @property
    def title(self) -> str:
        """The op as the pattern writes it: by its name, or as an operator."""
        written = self.place.text.startswith(("any", self.ops[0].name))
        return " or ".join(op.name if written else _SYMBOLS.get(op.name, op.name) for op in self.ops)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The part number `index` of `count` along the last axis of `source`."""

    source: Term
    index: int
    count: int
    place: Place
    siblings: list[Piece]
    """All the parts of the line, this one among them."""
    title: str = "split"

    @property
    def operands(self) -> tuple[Term, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The nearest node upstream that calls the op of `call`."""

    call: Call
    place: Place

    @property
    def operands(self) -> tuple[Term, ...]:
        return (self.call,)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A name no line makes: a value, or (first letter a capital) a parameter. `_` is anything."""

    name: str
    optional: bool
    place: Place

    @property
    def parameter(self) -> bool:
        return self.name[0].isupper()


@dataclass(frozen=True, slots=True)
class Number:
    """A number that must be there."""

    value: int | float
    place: Place


Term = Call | Piece | Nearest | Leaf | Number
Inner = Call | Piece


def operands_of(term: Term) -> tuple[Term, ...]:
    return term.operands if isinstance(term, (Call, Piece, Nearest)) else ()


def walk(*roots: Term) -> Iterator[Term]:
    """Every term below `roots`, each once."""
    seen: set[int] = set()
    stack = list(reversed(roots))
    while stack:
        term = stack.pop()
        if id(term) not in seen:
            seen.add(id(term))
            yield term
            stack.extend(reversed(operands_of(term)))


@dataclass(frozen=True)
class Variant:
    """A pattern with every `any` decided: what each name stands for, and the outputs among the names."""

    values: dict[str, Term]
    """Names of lines."""
    outputs: tuple[str, ...]

    @cached_property
    def roots(self) -> tuple[Term, ...]:
        """The outputs, the last one first: the one that matching starts from."""
        return tuple(self.values[name] for name in reversed(self.outputs))

    @cached_property
    def inner(self) -> tuple[Inner, ...]:
        """Every op, from the outputs backward."""
        return tuple(term for term in walk(*self.roots) if isinstance(term, (Call, Piece)))

    @cached_property
    def leaves(self) -> dict[str, Leaf]:
        """Names that no line makes, each where it is first met."""
        found: dict[str, Leaf] = {}
        for term in walk(*self.roots):
            if isinstance(term, Leaf) and term.name != "_":
                found.setdefault(term.name, term)
        return found


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a parameter: a name binds a dimension, a number must be there, None is anything."""

    value: str
    sizes: tuple[str | int | None, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Pattern:
    """A kind of site: `name` is the word for `at:`, `taps` its named values."""

    name: str
    variants: tuple[Variant, ...]
    taps: dict[str, str]
    """Each tap with the name it stands for in the lines."""
    shapes: tuple[Shape, ...] = ()
    where: Expr | None = None
    single: tuple[Place, ...] = ()
    """Values that nothing outside of a match reads."""
    doc: str = ""
    file: str = ""
    span: Span | None = None
    dims: tuple[str, ...] = field(default=())
    """Names of dimensions that `shapes` binds."""


def path_to(root: Inner, anchor: Inner) -> list[Inner] | None:
    """The terms from the one that reads `anchor` up to `root`; None where a `nearest` stands between."""
    if root is anchor:
        return []
    for term, path in paths_below(root):
        if term is anchor:
            return path
    return None


def paths_below(root: Inner) -> Iterator[tuple[Term, list[Inner]]]:
    """Every term below `root` that is no further than ops away, with the terms from its reader up to `root`."""
    queue: deque[tuple[Inner, list[Inner]]] = deque([(root, [root])])
    seen = {id(root)}
    while queue:
        term, path = queue.popleft()
        for part in term.operands:
            if id(part) in seen or isinstance(part, Nearest):
                continue
            seen.add(id(part))
            yield part, path
            if isinstance(part, (Call, Piece)):
                queue.append((part, [part, *path]))
