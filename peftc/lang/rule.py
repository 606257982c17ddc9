"""The rule as a typed value: what a YAML rule says, checked, with every part knowing its place in the file.

A `Rule` is made by `peftc.lang.loader.load_rule` and never changed. It holds no torch object: sizes are still
expressions over dimension names, to be evaluated for each site by the planner.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from peftc.diagnostics import Span
from peftc.lang.layers import Layers, layer_set

if TYPE_CHECKING:
    from peftc.patterns.terms import Pattern

Scalar = int | float | bool | str | tuple[int, ...] | None
"""A value without axes: a number, a word, nothing; or a hyperparameter's list of distinct whole numbers."""
Share = Literal["site", "layer", "kind", "stack", "model"]


@dataclass(frozen=True, slots=True)
class Expr:
    """An expression in the closed subset of Python's grammar that `peftc.lang.expr` admits.

    `span_of(node)` gives the place of any node of `tree` in the rule file.
    """

    text: str
    tree: ast.expr
    span: Span | None = None
    exact: bool = True
    """Whether columns inside the text map one to one to columns of the source line."""

    def span_of(self, node: ast.AST) -> Span | None:
        start = getattr(node, "col_offset", None)
        end = getattr(node, "end_col_offset", None)
        if self.span is None or start is None or end is None or not self.exact:
            return self.span
        span = self.span
        return Span(span.file, span.line, span.col + start, span.col + end, span.text)


@dataclass(frozen=True, slots=True)
class Budget:
    """How many parameters may be trained: `percent` of the base's, or `count`; `text` as it is written."""

    text: str
    percent: Fraction | None = None
    count: int | None = None
    span: Span | None = None

    def limit(self, base: int) -> int:
        """The number of parameters on a base of `base`."""
        if self.percent is None:
            return self.count or 0
        return math.floor(base * self.percent / 100)


@dataclass(frozen=True, slots=True)
class LayerValue:
    """A value that a hyperparameter has in some layers; `text` is the selector as it is written."""

    text: str
    layers: Layers
    value: Scalar
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Hyper:
    """A number, a word or a list of whole numbers that `--set name=value` may change."""

    name: str
    value: Scalar
    """Of every layer that `layers` does not name; the smallest that is admitted while `budget` is not yet solved."""
    min: float | None = None
    max: float | None = None
    doc: str = ""
    span: Span | None = None
    layers: tuple[LayerValue, ...] = ()
    """Of those that name a layer the last one holds."""
    budget: Budget | None = None
    """The value is the largest with which the rule trains no more than this; the planner finds it."""
    given: bool = False
    """Whether the value was set from outside, and does not stand in the rule."""

    def at(self, layer: int, count: int) -> Scalar:
        """The value in a layer of a stack of `count`; -1 is outside of layers."""
        for given in reversed(self.layers):
            if layer >= 0 and layer in layer_set(given.layers, count):
                return given.value
        return self.value

    @property
    def shown(self) -> str:
        """The value in words: `8`, `8 (layers 0-3: 16)`, `0.5%`."""
        named = "; ".join(f"{given.text}: {given.value}" for given in self.layers)
        return f"{self.budget.text if self.budget else in_words(self.value)}" + (f" ({named})" if named else "")


def in_words(value: Scalar) -> str:
    """A value as `--set` takes it: a list is 11,12,40, and a long one is cut."""
    if not isinstance(value, tuple):
        return str(value)
    text = ",".join(map(str, value))
    return text if len(text) <= 60 else f"{text[:40].rpartition(',')[0]},... ({len(value)} numbers)"


@dataclass(frozen=True, slots=True)
class Param:
    """A trainable (or `frozen`) tensor of a delta; `shape` and `condition` are expressions over static names, `init`
    over these, the frozen tensors `weight` and `h`, and the parameters above it."""

    name: str
    shape: tuple[Expr, ...]
    init: Expr
    dtype: str | None = None
    share: Share = "site"
    frozen: bool = False
    condition: Expr | None = None
    lr: Expr | None = None
    """What the base learning rate is multiplied by (default 1), over static names."""
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Attend:
    """The site's own queries attending to `keys` [l, kv_heads, key_dim] and `values` [l, kv_heads, head_dim].

    Both may have a batch axis in front.
    """

    keys: Expr
    values: Expr


@dataclass(frozen=True, slots=True)
class Form:
    """A functional form dh = f(x): either an expression `dh` or `attend`."""

    name: str
    params: tuple[Param, ...] = ()
    args: dict[str, Scalar] = field(default_factory=dict)
    let: dict[str, Expr] = field(default_factory=dict)
    dh: Expr | None = None
    attend: Attend | None = None
    doc: str = ""
    paper: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Where:
    """Which of the sites named by `at`: every given condition must hold."""

    layers: Layers | None = None
    stack: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    role: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    condition: Expr | None = None
    spans: dict[str, Span] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reference:
    """A tap of another site, `encoder.block[layer - 1].out`, or a carried value, `rung[layer - 1]`; without an index it
    is that of the same layer."""

    text: str
    kind: str
    """The kind of the site, or the entry of `carry`."""
    tap: str
    """"" for a carried value."""
    index: Expr | None = None
    stack: str = ""
    span: Span | None = None
    otherwise: Reference | None = None
    """What is read where this one names no layer that the model has: `a or b`."""

    @property
    def choices(self) -> tuple[Reference, ...]:
        """This reference and those that stand in for it, in order."""
        return (self, *(self.otherwise.choices if self.otherwise is not None else ()))


@dataclass(frozen=True, slots=True)
class Delta:
    """One row of the table: a form at a modified representation, inserted and composed."""

    name: str
    at: tuple[str, ...]
    modify: tuple[str, ...]
    insert: str
    """"parallel", "sequential", or the name of the tap that is the delta's input x."""
    form: Form
    compose: Expr
    """An expression in h and dh; the named ones `add`, `gate`, `prepend` are a bare name."""
    arguments: dict[str, Scalar | Expr] = field(default_factory=dict)
    """The row's `with:`; values for the form's `args` and sizes."""
    where: Where = field(default_factory=Where)
    params: tuple[Param, ...] = ()
    let: dict[str, Expr] = field(default_factory=dict)
    lower: str | None = None
    expect: int | None = None
    span: Span | None = None
    spans: dict[str, Span] = field(default_factory=dict)
    """The place of each key's value in the row (`at`, `modify`, `insert`, `form`, `compose`, ...)."""
    sources: dict[str, Reference] = field(default_factory=dict)
    """The row's `from:`, by the name that its expressions read; `x` where the delta's input itself is elsewhere."""
    sets: dict[str, Expr] = field(default_factory=dict)
    """An entry of `rewrite:`: what becomes of each tap of `modify`. Its `form` is empty and `compose` is not read."""
    optional: frozenset[str] = frozenset()
    """Taps of `modify` that a site may lack."""
    value: Expr | None = None
    """An entry of `carry:`: what it computes at each site. It modifies nothing, and its `form` is empty."""
    places: dict[str, str | None] = field(default_factory=dict)
    """What `load` reads from: each name to the directory given with --set, or None where none was."""

    def span_at(self, key: str) -> Span | None:
        return self.spans.get(key, self.span)


@dataclass(frozen=True, slots=True)
class Glob:
    """A glob over parameter names, with its place."""

    pattern: str
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class SameAs:
    """Another rule that computes the same: its name or file, and the names of rows and parameters there."""

    rule: str
    hyper: dict[str, Scalar] = field(default_factory=dict)
    map: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One test of a rule on one family: what must hold there. None and empty say that nothing is expected."""

    name: str
    family: str
    head: str | None = None
    hyper: dict[str, Scalar] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=dict)
    """The number of sites by row."""
    trained: int | None = None
    identity: bool | None = None
    fold: dict[str, str] = field(default_factory=dict)
    """What becomes of each row: merged, widened, constant or kept."""
    forbidden: Where | None = None
    same_as: SameAs | None = None
    error: str | None = None
    span: Span | None = None
    spans: dict[str, Span] = field(default_factory=dict)
    """The place of each expectation (`sites`, `sites.lora`, `trained`, ...)."""

    @property
    def label(self) -> str:
        return f"{self.name}[{self.family}]"

    def span_at(self, key: str) -> Span | None:
        return self.spans.get(key) or self.spans.get(key.partition(".")[0], self.span)


@dataclass(frozen=True, slots=True)
class Rule:
    """A whole rule file, hyperparameters resolved."""

    name: str
    deltas: tuple[Delta, ...] = ()
    hyper: dict[str, Hyper] = field(default_factory=dict)
    train: tuple[Glob, ...] = ()
    doc: str = ""
    paper: str = ""
    file: str = ""
    text: str = ""
    """The YAML source with the `--set` values in place and without `tests`, enough to load the same rule again."""
    tests: tuple[Case, ...] = ()
    patterns: dict[str, Pattern] = field(default_factory=dict)
    """The patterns that rows name under `at`: the rule's own and the library's."""

    @property
    def values(self) -> dict[str, Scalar]:
        return {name: hyper.value for name, hyper in self.hyper.items()}

    def values_at(self, layer: int, count: int) -> dict[str, Scalar]:
        """The values in a layer of a stack of `count`; -1 is outside of layers."""
        return {name: hyper.at(layer, count) for name, hyper in self.hyper.items()}

    @property
    def budgeted(self) -> Hyper | None:
        """The hyperparameter whose value is still to be found."""
        return next((hyper for hyper in self.hyper.values() if hyper.budget is not None), None)
