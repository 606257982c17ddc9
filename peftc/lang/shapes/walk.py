"""Walks an expression with shapes in place of tensors, and tells every call that cannot fit.

    walk = Walk(Sizes(), {"x": Shape((symbol("d_in"),), open=True), ...})
    walk.value(parse("linear(x, W)"))      # the shape; mistakes are in walk.found

A mistake is told once: what comes of it is "not known", which fits everything.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from peftc.diagnostics import Diagnostic, Span
from peftc.lang.ops import OPS, Op
from peftc.lang.rule import Expr, Scalar
from peftc.lang.shapes.axes import swapped
from peftc.lang.shapes.operands import axis_of, static_size, tensor, whole
from peftc.lang.shapes.polynomial import (
    Polynomial,
    bounded,
    constant,
    divide,
    floor_divide,
    power,
    remainder,
)
from peftc.lang.shapes.rules import apply, broadcast, matmul
from peftc.lang.shapes.terms import UNKNOWN, Misfit, Shape, Size, Sizes, Static, Value

_NUMBERS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIZES: dict[type[ast.operator], Callable[[Polynomial, Polynomial], Size]] = {
    ast.Add: lambda a, b: bounded(a + b),
    ast.Sub: lambda a, b: bounded(a - b),
    ast.Mult: lambda a, b: bounded(a * b),
    ast.Div: divide,
    ast.FloorDiv: floor_divide,
    ast.Mod: remainder,
    ast.Pow: lambda a, b: None if b.value is None or b.value.denominator != 1 else power(a, int(b.value)),
}
_COMPARE: dict[type[ast.cmpop], Callable[[Scalar, Scalar], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,  # pyright: ignore[reportAssignmentType] -- words are told apart before
    ast.LtE: operator.le,  # pyright: ignore[reportAssignmentType]
    ast.Gt: operator.gt,  # pyright: ignore[reportAssignmentType]
    ast.GtE: operator.ge,  # pyright: ignore[reportAssignmentType]
}
_LONGEST_NAME = 32


def number(value: Scalar) -> Value:
    """A static value that is known; of a list, how many numbers it holds is known too."""
    if isinstance(value, tuple):
        return [number(item) for item in value]
    size = constant(value) if type(value) is int and abs(value) < 2**63 else None
    return Static(size, value, known=True)


@dataclass(slots=True)
class Walk:
    """Evaluates expressions in `env`; `found` gathers errors, and warnings of what fits by chance."""

    sizes: Sizes
    env: dict[str, Value]
    found: list[Diagnostic] = field(default_factory=list)
    expr: Expr | None = None

    def value(self, expr: Expr) -> Value:
        previous, self.expr = self.expr, expr
        try:
            return self.visit(expr.tree)
        finally:
            self.expr = previous

    def visit(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=value):
                return number(value)  # pyright: ignore[reportArgumentType] -- the grammar admits scalars only
            case ast.Name(id=name):
                return self.env.get(name, UNKNOWN)
            case ast.BinOp():
                return self._binary(node)
            case ast.UnaryOp(op=op, operand=operand):
                return self._unary(op, self.visit(operand))
            case ast.IfExp():
                return self._choice(node)
            case ast.BoolOp() | ast.Compare():
                return self._condition(node)
            case ast.Call():
                return self._call(node)
            case ast.Attribute(value=inner):
                return self._told(node, [inner], [self.visit(inner)], lambda xs: _turned(tensor(xs, 0)))
            case ast.Subscript(value=inner, slice=index):
                value = self.visit(inner)
                return self._told(node, [inner], [value], lambda xs: self._indexed(tensor(xs, 0), index))
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self.visit(item) for item in items]
        return UNKNOWN

    def _told(
        self, node: ast.expr, parts: Sequence[ast.expr], values: list[Value], rule: Callable[[list[Value]], Value]
    ) -> Value:
        """The rule's result; a misfit is told at `node`, in the words of `parts`, the operands."""
        self.sizes.chances.clear()
        try:
            result = rule(values)
        except Misfit as misfit:
            self._tell(node, parts, values, misfit)
            return UNKNOWN
        self.warn(self._text(node), self.expr.span_of(node) if self.expr else None)
        return result

    def _tell(self, node: ast.expr, parts: Sequence[ast.expr], values: list[Value], misfit: Misfit) -> None:
        names = [self._text(part) for part in parts]
        shapes = [f"{names[i]} is {values[i]}" for i in misfit.operands if isinstance(values[i], Shape)]
        reason, help = _named(misfit.reason, names), _named(misfit.help or "", names)
        said = " but ".join(shapes) or reason
        help = help or (reason if shapes else "")
        at = parts[misfit.operands[-1]] if misfit.operands and isinstance(node, ast.Call) else node
        span = self.expr.span_of(at) if self.expr else None
        op = self._op(node)
        if not help and op is not None:
            help = f"{op.name}: {op.doc}"
        self.found.append(Diagnostic("E013", f"`{self._text(node)}` does not fit: {said}", span, help or None))

    def _op(self, node: ast.expr) -> Op | None:
        """The op that a call is of, by its name or by a word argument of the form, such as f: relu."""
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        word = self.env.get(name)
        if isinstance(word, Static):
            name = word.value if word.known and isinstance(word.value, str) else ""
        return OPS.get(name)

    def warn(self, text: str, span: Span | None) -> None:
        """W006 where the last call fitted by chance."""
        if not self.sizes.chances:
            return
        one, other = self.sizes.chances.pop()
        message = f"`{text}` fits only where {one} is {other}"
        if {str(one), str(other)} == {"d_in", "d_out"}:
            help = "it is refused at other sites; `where: {if: d_in == d_out}` says that it is meant"
        else:
            help = f"write {one} for both: another value under --set would part them"
        self.found.append(Diagnostic("W006", message, span, help, "warning"))

    def _text(self, node: ast.expr) -> str:
        """The part as it is written, cut where it is long."""
        start, end = node.col_offset, node.end_col_offset
        text = self.expr.text[start:end] if self.expr is not None else ast.unparse(node)
        return text if len(text) <= 2 * _LONGEST_NAME else f"{text[: 2 * _LONGEST_NAME - 3]}..."

    def _call(self, node: ast.Call) -> Value:
        values = [self.visit(argument) for argument in node.args]
        keywords = {keyword.arg: self.visit(keyword.value) for keyword in node.keywords if keyword.arg}
        if isinstance(node.func, ast.Name) and node.func.id == "len" and len(values) == 1:
            return self._length(node.args[0], values[0])
        op = self._op(node)
        if op is None or not op.arity[0] <= len(values) <= op.arity[1]:
            return UNKNOWN
        return self._told(node, node.args, values, lambda xs: apply(op.name, self.sizes, xs, keywords))

    def _length(self, part: ast.expr, value: Value) -> Value:
        """How many numbers a list holds; E009 for what is known to be no list."""
        if isinstance(value, list):
            return number(len(value))
        if isinstance(value, Static) and value.known and value.value is not None:
            message = f"`{self._text(part)}` is {value.value}, and `len` takes a list"
            span, help = self.expr.span_of(part) if self.expr else None, "a list is a hyperparameter: ids: [11, 12, 40]"
            self.found.append(Diagnostic("E009", message, span, help))
        return Static()

    def _binary(self, node: ast.BinOp) -> Value:
        left, right = self.visit(node.left), self.visit(node.right)
        if isinstance(left, Static) and isinstance(right, Static):
            return _arithmetic(node.op, left, right)
        if isinstance(node.op, ast.MatMult):
            rule: Callable[[list[Value]], Value] = lambda xs: matmul(self.sizes, xs)  # noqa: E731
        elif isinstance(node.op, ast.Pow):
            rule = lambda xs: tensor(xs, 0)  # noqa: E731
        else:
            rule = lambda xs: broadcast(self.sizes, xs)  # noqa: E731
        return self._told(node, [node.left, node.right], [left, right], rule)

    def _unary(self, op: ast.unaryop, value: Value) -> Value:
        if isinstance(value, Shape):
            return value
        if not isinstance(value, Static):
            return Static()
        if isinstance(op, ast.Not):
            return Static(None, not value.value, known=True) if value.known else Static()
        size = None if value.size is None else constant(0) - value.size
        known = value.known and isinstance(value.value, (int, float))
        return Static(size, -value.value if known else None, known)  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]

    def _choice(self, node: ast.IfExp) -> Value:
        test = self.visit(node.test)
        if isinstance(test, Static) and test.known:
            return self.visit(node.body if test.value else node.orelse)
        with self._unsure():
            one, other = self.visit(node.body), self.visit(node.orelse)
            return _either(self.sizes, one, other)

    @contextmanager
    def _unsure(self) -> Iterator[None]:
        before, self.sizes.sure_only = self.sizes.sure_only, True
        try:
            yield
        finally:
            self.sizes.sure_only = before

    def _condition(self, node: ast.BoolOp | ast.Compare) -> Value:
        parts = node.values if isinstance(node, ast.BoolOp) else [node.left, *node.comparators]
        values = [self.visit(part) for part in parts]
        known = [value.value for value in values if isinstance(value, Static) and value.known]
        if isinstance(node, ast.BoolOp):
            stops = isinstance(node.op, ast.Or)
            if any(bool(value) is stops for value in known):
                return number(stops)
            return number(not stops) if len(known) == len(values) else Static()
        if len(known) < len(values):
            return Static()
        return number(all(_compare(op, *known[i : i + 2]) for i, op in enumerate(node.ops)))

    def _indexed(self, x: Shape, index: ast.expr) -> Shape:
        """`x[...]`: axes from the front, so of an open shape nothing stays known."""
        items = index.elts if isinstance(index, ast.Tuple) else [index]
        if x.open:
            return UNKNOWN
        if len(items) > len(x.sizes):
            raise Misfit(f"{{0}} has {len(x.sizes)} axes, and {len(items)} indices", 0)
        found = [self._cut(size, item) for size, item in zip(x.sizes, items, strict=False)]
        kept = [size for size, item in zip(found, items, strict=True) if isinstance(item, ast.Slice)]
        return Shape((*kept, *x.sizes[len(items) :]))

    def _cut(self, size: Size, item: ast.expr) -> Size:
        """The size of an axis after `[start:stop]`. Raises `Misfit` for an index that is never there."""
        if not isinstance(item, ast.Slice):
            index, count = whole(self.visit(item)), None if size is None else size.value
            if index is not None and count is not None and not -count <= index < count:
                raise Misfit(f"an axis of {count} has no index {index}", 0)
            return None
        start = self.visit(item.lower) if item.lower else number(0)
        stop = static_size(self.visit(item.upper)) if item.upper else size
        first = static_size(start)
        if size is None or stop is None or first is None:
            return None
        bounds = [stop.value, first.value, size.value]
        if None not in bounds:
            stop_at, start_at, count = (int(bound or 0) for bound in bounds)
            return constant(len(range(count)[start_at:stop_at]))
        inside = _at_least(size, stop) and _at_least(stop, first) and _at_least(first, constant(0))
        return bounded(stop - first) if inside else None


def _at_least(a: Polynomial, b: Polynomial) -> bool:
    return (a - b).holds_of(lambda c: c >= 0)


def _turned(x: Shape) -> Shape:
    if not x.open and len(x.sizes) < 2:
        raise Misfit("`.T` swaps the last two axes, and {0} has fewer", 0)
    one, two = axis_of(x, -1), axis_of(x, -2)
    return UNKNOWN if one is None or two is None else swapped(x, one, two)


def _arithmetic(op: ast.operator, left: Static, right: Static) -> Static:
    """Of two numbers; what has no value, as a division by zero, is left for the planner to tell."""
    sizes = None
    if left.size is not None and right.size is not None and type(op) in _SIZES:
        sizes = _SIZES[type(op)](left.size, right.size)
    if not (left.known and right.known):
        return Static(sizes)
    a, b = left.value, right.value
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)) or type(op) not in _NUMBERS:
        return Static(sizes)
    if max(abs(a), abs(b)) > 2**63 or (isinstance(op, ast.Pow) and (abs(b) > 64 or a < 0)):
        return Static(sizes)
    try:
        value = _NUMBERS[type(op)](a, b)
    except (ZeroDivisionError, OverflowError):
        return Static(sizes)
    if sizes is None and type(value) is int:
        sizes = constant(value)
    return Static(sizes, value, known=True)


def _compare(op: ast.cmpop, a: Scalar, b: Scalar) -> bool:
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return (numbers or isinstance(op, (ast.Eq, ast.NotEq))) and _COMPARE[type(op)](a, b)


def _either(sizes: Sizes, one: Value, other: Value) -> Value:
    """What is known of a value that is one or the other."""
    if isinstance(one, Shape) and isinstance(other, Shape):
        if one.open == other.open and len(one.sizes) == len(other.sizes):
            pairs = zip(one.sizes, other.sizes, strict=True)
            return Shape(tuple(a if sizes.verdict(a, b) == "same" else None for a, b in pairs), one.open)
        return UNKNOWN
    return Static() if isinstance(one, Static) and isinstance(other, Static) else UNKNOWN


def _named(text: str, names: Sequence[str]) -> str:
    """`{0}` in a rule's words replaced by how the operand is written."""
    for position, name in enumerate(names):
        text = text.replace(f"{{{position}}}", name)
    return text
