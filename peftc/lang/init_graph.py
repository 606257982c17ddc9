"""The initial values of parameters as a small torch.fx graph of their own, apart from the model's.

Lowered like any expression, on fake tensors, so that shapes are checked where no weight is at hand, and run later on
real ones. Equal calls are written once: `svd_u(weight, r)` and `svd_vt(weight, r)` decompose one time.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.diagnostics import fail
from peftc.ir.builder import Builder, Operand
from peftc.ir.initial import Init, Recipe, Saved, Stored
from peftc.ir.program import DeltaParameter
from peftc.lang.init_writers import INIT_WRITERS
from peftc.lang.inits import is_draw
from peftc.lang.lower import Lowering, Value
from peftc.lang.ops import INITS
from peftc.lang.rule import Expr
from peftc.lang.static import evaluate_static

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Draw:
    """A random draw or a constant, in the shape of the parameter that asks for it."""

    name: str
    arguments: tuple[float, ...]
    shape: tuple[int, ...]
    parameter: str


Source = Stored | Saved | Draw | DeltaParameter


@dataclass(slots=True)
class InitGraph:
    """The graph: what its placeholders stand for, and the node of each parameter's value.

    Sources are a `Stored` tensor of the base, a `Saved` one of a delta directory, a `Draw`, or a `DeltaParameter` that
    starts without a recipe.
    """

    dtype: torch.dtype
    """What is computed in."""
    graph: fx.Graph = field(default_factory=fx.Graph)
    fake_mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    sources: dict[fx.Node, Source] = field(default_factory=dict)
    values: dict[str, fx.Node] = field(default_factory=dict)
    delta_parameters: dict[str, DeltaParameter] = field(default_factory=dict)
    known: dict[Any, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """One parameter, as a `Program` has them: it tells ops that make constants (`eye`, `range`) their dtype."""
        like = DeltaParameter("like", (1,), self.dtype, Init("zeros"), True, "init")
        self.delta_parameters[like.name] = like
        self.source(like)

    def placeholders(self, kind: str) -> dict[str, fx.Node]:
        return {"like": self.known["like"]} if kind == "parameter" else {}

    def source(self, what: Source) -> fx.Node:
        """The placeholder of a source; the same one for the same stored tensor or parameter."""
        key = what.name if isinstance(what, DeltaParameter) else what if isinstance(what, Stored) else None
        if key is not None and key in self.known:
            return self.known[key]
        node = self.graph.placeholder(f"source_{len(self.sources)}")
        with self.fake_mode:
            node.meta["val"] = torch.empty(what.shape, dtype=self.dtype)
        self.sources[node] = what
        if key is not None:
            self.known[key] = node
        return node

    def add(self, parameter: DeltaParameter) -> fx.Node:
        """Lower the recipe of `parameter`. Raises `PeftcError` E013 where shapes do not fit."""
        recipe = parameter.init.recipe
        assert recipe is not None
        if parameter.name in self.values:
            return self.values[parameter.name]
        builder = _Once(self)
        lowering = InitLowering(builder, parameter, self)
        value = lowering.lower(recipe.expr)
        if isinstance(value, (int, float)):
            value = self.source(Draw("constant", (float(value),), parameter.shape, parameter.name))
        if not isinstance(value, fx.Node):
            fail("E009", f"`init` of `{parameter.name}` is {value!r}, not a tensor", span=recipe.expr.span)
        shape = tuple(value.meta["val"].shape)
        if shape != parameter.shape:
            message = f"`init` of `{parameter.name}` is {list(shape)}, and its shape is {list(parameter.shape)}"
            fail("E013", message, span=recipe.expr.span, help="a start has the shape of its parameter, entry by entry")
        self.values[parameter.name] = builder.cast(value, parameter.dtype)
        return self.values[parameter.name]


LARGEST = 2**30
"""Elements of a tensor on the way to a start: a rule is data from a stranger, and kron(weight, weight) is short."""


class _Once(Builder):
    """Writes a call that is there already no second time, and refuses one whose result no memory is for."""

    def __init__(self, graph: InitGraph) -> None:
        self._owner: InitGraph = graph
        super().__init__(graph, graph.known["like"], label="init")  # pyright: ignore[reportArgumentType]

    def call(self, target: Any, *args: Operand, **kwargs: Operand) -> fx.Node:
        key = (target, _frozen(args), _frozen(kwargs))
        if key not in self._owner.known:
            self.cursor = list(self._owner.graph.nodes)[-1]
            node = super().call(target, *args, **kwargs)
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and value.numel() > LARGEST:
                raise ValueError(f"a tensor of {list(value.shape)} on the way to a start; the limit is 2 ** 30 entries")
            self._owner.known[key] = node
        return self._owner.known[key]


def _frozen(value: Any) -> Any:
    """`value` as a key, numbers told apart by type: 1 and 1.0 are different operands."""
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return value if isinstance(value, fx.Node) else (type(value).__name__, value)


class InitLowering(Lowering):
    """Lowers the `init` of one parameter."""

    def __init__(self, builder: Builder, parameter: DeltaParameter, graph: InitGraph) -> None:
        recipe = parameter.init.recipe
        assert recipe is not None
        super().__init__(builder, recipe.statics, recipe.site)
        self.parameter, self.recipe, self.graph = parameter, recipe, graph

    def _name(self, node: ast.expr, name: str) -> Value:
        if name in INITS and self._expr is self.recipe.expr:
            return self._draw(name, [])
        if name not in self.env:
            self.env[name] = self._tensor(name)
        return super()._name(node, name) if self.env[name] is not None else self._absent(node, name)

    def _tensor(self, name: str) -> Value:
        recipe = self.recipe
        if name in recipe.above:
            return self._above(recipe.above[name])
        if name in recipe.lets:
            return self.lower(recipe.lets[name])
        return self.graph.source(recipe.frozen[name]) if name in recipe.frozen else None

    def _above(self, parameter: DeltaParameter | None) -> fx.Node | None:
        """The value of an earlier parameter as it is stored, in its own dtype."""
        if parameter is None:
            return None
        node = self.graph.source(parameter) if parameter.init.recipe is None else self.graph.add(parameter)
        return self.builder.cast(node, self.graph.dtype)

    def _absent(self, node: ast.expr, name: str) -> Value:
        what = "a parameter whose `if` is false" if name in self.recipe.above else "no stored weight"
        fail("E004", f"`{name}` is {what} at {self.place}", span=self._span(node), help="narrow the sites with `where`")

    def _op(self, node: ast.Call) -> Value:
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if is_draw(node):
            return self._draw(name, node.args)
        if name == "load":
            return self.graph.source(self.recipe.saved[ast.unparse(node)])
        if name not in INIT_WRITERS or isinstance(self.env.get(name), str):
            return super()._op(node)
        args = [self._visit(argument) for argument in node.args]
        kwargs = {keyword.arg: self._visit(keyword.value) for keyword in node.keywords if keyword.arg}
        operands = list(zip(node.args, args, strict=True))
        return self._guard(node, operands, lambda: INIT_WRITERS[name](self.builder, *args, **kwargs))

    def _draw(self, name: str, arguments: Iterable[ast.expr]) -> fx.Node:
        numbers = draw_numbers(self.recipe.expr, arguments, self.recipe.statics)
        return self.graph.source(Draw(name, numbers, self.parameter.shape, self.parameter.name))


def draw_numbers(expr: Expr, arguments: Iterable[ast.expr], statics: Mapping[str, Any]) -> tuple[float, ...]:
    """The numbers a draw is called with; E009 for a word."""
    found: list[float] = []
    for argument in arguments:
        part = Expr(ast.unparse(argument), argument, expr.span, False)
        number = evaluate_static(part, statics)
        if not isinstance(number, (int, float)):
            fail("E009", f"`{part.text}` is {number!r}, not a number", span=expr.span_of(argument))
        found.append(float(number))
    return tuple(found)


def compute_dtype(parameters: Iterable[DeltaParameter]) -> torch.dtype:
    """float64 where one of the parameters is float64, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


def check_recipes(parameters: Iterable[DeltaParameter]) -> None:
    """Lower every recipe once for each set of sizes. Raises `PeftcError` E004, E013."""
    seen: set[Any] = set()
    for parameter in parameters:
        recipe = parameter.init.recipe
        if recipe is not None and (key := _sizes_of(parameter, recipe)) not in seen:
            InitGraph(compute_dtype([parameter])).add(parameter)
            seen.add(key)


def _sizes_of(parameter: DeltaParameter, recipe: Recipe) -> Any:
    statics = tuple(sorted((name, value) for name, value in recipe.statics.items() if name != "layer"))
    if "layer" in recipe.expr.text or any("layer" in expr.text for expr in recipe.lets.values()):
        statics += (("layer", recipe.statics.get("layer")),)
    above = tuple((name, p and (p.shape, p.init.recipe is None)) for name, p in recipe.above.items())
    frozen = tuple((name, stored.shape) for name, stored in recipe.frozen.items())
    return recipe.expr, parameter.shape, parameter.dtype, _typed(statics), above, frozen


def _typed(pairs: Iterable[tuple[str, Any]]) -> tuple[Any, ...]:
    return tuple((name, type(value).__name__, value) for name, value in pairs)
