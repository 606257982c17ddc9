"""Lowering: an expression of a rule becomes a torch.fx subgraph.

Names resolve in an environment of nodes (tensors), static values (numbers, booleans, words) and None (a parameter
whose condition is false). Arithmetic on static values is done here and leaves no node. Each op runs on fake tensors
as it is written; what torch refuses is reported at the expression, with the shapes of both operands. How each op is
written stands in `peftc.lang.op_writers`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from peftc.diagnostics import PeftcError, did_you_mean, fail
from peftc.ir.axis_names import axis_names, shown
from peftc.ir.builder import Builder
from peftc.lang.grammar import MAX_EXPONENT
from peftc.lang.op_writers import write_op
from peftc.lang.rule import Expr
from peftc.lang.shapes.named import Named

aten = torch.ops.aten

Value = Any
"""fx.Node, int, float, bool, str, None, or a list of those."""

_BINARY: dict[type[ast.operator], tuple[Callable[[Any, Any], Any], Any]] = {
    ast.Add: (operator.add, aten.add.Tensor),
    ast.Sub: (operator.sub, aten.sub.Tensor),
    ast.Mult: (operator.mul, aten.mul.Tensor),
    ast.Div: (operator.truediv, aten.div.Tensor),
    ast.MatMult: (operator.matmul, aten.matmul.default),
    ast.Pow: (operator.pow, aten.pow.Tensor_Scalar),
    ast.FloorDiv: (operator.floordiv, None),
    ast.Mod: (operator.mod, None),
}

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


PLACE = "peftc_place"
"""The key of a node's `meta` under which the text and the span of its expression stand."""


class Lowering:
    """Lowers the expressions of one delta at one site; `place` names the site in error messages."""

    def __init__(
        self, builder: Builder, env: Mapping[str, Value], place: str, names: Callable[[], Named | None] = lambda: None
    ) -> None:
        self.builder = builder
        self.env = dict(env)
        self.place = place
        self._named = names
        self._expr: Expr | None = None

    def lower(self, expr: Expr) -> Value:
        """The value of `expr`: a node, or a static value. Raises `PeftcError` E013 where shapes do not fit."""
        previous, self._expr = self._expr, expr
        try:
            return self._visit(expr.tree)
        finally:
            self._expr = previous

    def tensor(self, expr: Expr) -> fx.Node:
        """The value of `expr`, which must be a tensor."""
        value = self.lower(expr)
        if not isinstance(value, fx.Node):
            help = "it is made of numbers alone; a dimension bears the name of no tap: that value is `h`"
            fail("E009", f"`{expr.text}` is {value!r}, not a tensor", span=expr.span, help=help)
        return value

    def _visit(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, op, self._visit(left), self._visit(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self._visit(operand)
                if is_size(value):
                    return self._call(node, operator.neg, value)
                return self._call(node, aten.neg.default, value) if isinstance(value, fx.Node) else -value
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._static(operand)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._visit(body if self._static(test) else orelse)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._compare(left, ops, comparators)
            case ast.BoolOp(op=op, values=values):
                results = (self._static(value) for value in values)
                return all(results) if isinstance(op, ast.And) else any(results)
            case ast.Call():
                return self._op(node)
            case ast.Attribute(value=value, attr="T"):
                return self._call(node, aten.transpose.int, self._visit(value), -2, -1)
            case ast.Subscript(value=value, slice=index):
                return self._subscript(node, self._visit(value), index)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._visit(item) for item in items]
        fail("E011", f"`{ast.unparse(node)}` is not admitted in an expression", span=self._span(node))

    def _span(self, node: ast.AST) -> Any:
        return self._expr.span_of(node) if self._expr is not None else None

    def _name(self, node: ast.expr, name: str) -> Value:
        if name not in self.env:
            fail("E008", f"unknown name `{name}`", span=self._span(node), help=did_you_mean(name, self.env))
        value = self.env[name]
        return list(value) if isinstance(value, tuple) else value

    def _static(self, node: ast.expr) -> Any:
        value = self._visit(node)
        if isinstance(value, fx.Node):
            fail(
                "E009",
                f"`{ast.unparse(node)}` is a tensor; a condition must be known when the graph is written",
                span=self._span(node),
            )
        return value

    def _bound(self, node: ast.expr) -> Any:
        """A number, or the size of an axis that is known when the graph runs."""
        value = self._visit(node)
        return value if is_size(value) else self._static(node)

    def _compare(self, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr]) -> bool:
        first = self._static(left)
        for op, comparator in zip(ops, comparators, strict=True):
            second = self._static(comparator)
            if not _COMPARE[type(op)](first, second):
                return False
            first = second
        return True

    def _binary(self, node: ast.expr, op: ast.operator, left: Value, right: Value) -> Value:
        static, target = _BINARY[type(op)]
        if all(is_size(value) or isinstance(value, int) for value in (left, right)) and (
            is_size(left) or is_size(right)
        ):
            return self._call(node, static, left, right)
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            if isinstance(op, ast.Pow) and isinstance(right, (int, float)) and abs(right) > MAX_EXPONENT:
                fail("E017", f"the exponent {right} is beyond {MAX_EXPONENT}", span=self._span(node))
            try:
                return static(left, right)
            except (TypeError, ZeroDivisionError, OverflowError) as error:
                fail("E009", f"`{ast.unparse(node)}`: {error}", span=self._span(node))
        if target is None:
            fail("E011", "`//` and `%` are for sizes, not for tensors", span=self._span(node))
        if isinstance(op, ast.Pow) and isinstance(right, fx.Node):
            fail("E011", "an exponent must be a number", span=self._span(node))
        if isinstance(left, fx.Node):
            return self._call(node, target, left, right)
        if isinstance(op, ast.Sub):
            return self._call(node, aten.add.Tensor, self._call(node, aten.neg.default, right), left)
        if isinstance(op, ast.Div):
            return self._call(node, aten.mul.Tensor, self._call(node, aten.reciprocal.default, right), left)
        return self._call(node, target, right, left)

    def _subscript(self, node: ast.expr, value: Value, index: ast.expr) -> Value:
        items = index.elts if isinstance(index, ast.Tuple) else [index]
        axis = 0
        for item in items:
            if isinstance(item, ast.Slice):
                start = self._bound(item.lower) if item.lower else 0
                stop = self._bound(item.upper) if item.upper else 2**63 - 1
                if (start, stop) != (0, 2**63 - 1):
                    value = self._call(node, aten.slice.Tensor, value, axis, start, stop)
                axis += 1
            else:
                value = self._call(node, aten.select.int, value, axis, self._static(item))
        return value

    def _op(self, node: ast.Call) -> Value:
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if isinstance(self.env.get(name), str):  # a word argument of the form, such as f: relu
            name = self.env[name]
        args = [self._visit(arg) for arg in node.args]
        kwargs = {kw.arg: self._visit(kw.value) for kw in node.keywords if kw.arg}
        return self._guard(
            node, list(zip(node.args, args, strict=True)), lambda: write_op(name, self.builder, *args, **kwargs)
        )

    def _call(self, node: ast.expr, target: Any, *args: Value) -> fx.Node:
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        operands = [(part, value) for part, value in zip(parts, args, strict=False) if isinstance(value, fx.Node)]
        return self._guard(node, operands, lambda: self.builder.call(target, *args))

    def _guard(self, node: ast.expr, operands: list[tuple[ast.expr, Value]], write: Callable[[], fx.Node]) -> fx.Node:
        before = len(self.builder.nodes)
        try:
            value = write()
            self._mark(node, before)
            return value
        except PeftcError as error:
            raise error.at(self._span(node)) from error
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            told = [(part, value) for part, value in operands if isinstance(value, (fx.Node, type(None)))]
            fail(
                "E013",
                f"`{ast.unparse(node)}` does not fit at {self.place}: {self._told(told)}",
                span=self._span(node),
                help=_hint(node, [pair for pair in told if not is_size(pair[1])]) or self._readable(reason[0])[:200],
            )

    def _readable(self, reason: str) -> str:
        """What torch says, with the axes by name."""
        return shown([reason], axis_names(self.builder.program))[0]

    def _mark(self, node: ast.expr, before: int) -> None:
        """Keep with each new node where the rule asks for it, for what is told of the node later."""
        for written in self.builder.nodes[before:]:
            written.meta.setdefault(PLACE, (ast.unparse(node), self._span(node)))

    def _told(self, operands: list[tuple[ast.expr, Value]]) -> str:
        """What each operand is, with names: `x is [B, S, d_in=384] but W is [d_in=384, r=8]`."""
        named = self._named()
        parts = (f"{ast.unparse(part)} is {self._described(part, value, named)}" for part, value in operands)
        return " but ".join(dict.fromkeys(parts))

    def _described(self, part: ast.expr, value: Value, named: Named | None) -> str:
        if value is None:
            return "None (a parameter whose `if` is false)"
        if is_size(value):
            return str(value.meta["val"])
        sizes = shown(value.meta["val"].shape, axis_names(self.builder.program))
        return f"[{', '.join(sizes)}]" if named is None else named.shape(sizes, self._expr, part)


def is_size(value: Value) -> bool:
    """Whether a value is the size of an axis that is known only when the graph runs, such as the batch."""
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.SymInt)


def _hint(node: ast.expr, operands: list[tuple[ast.expr, Value]]) -> str | None:
    """When swapping the axes of a product's second operand would make it fit, say so; else how operands broadcast."""
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.MatMult):
        return "counted from the last, axes must be equal, or 1"
    op = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    op = "@" if (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)) or op == "matmul" else op
    if op not in ("linear", "@") or len(operands) < 2 or any(value is None for _, value in operands[:2]):
        return None
    left, right = (value.meta["val"].shape for _, value in operands[:2])
    if len(right) != 2 or not len(left) or left[-1] != right[0 if op == "linear" else 1]:
        return None
    wanted = "out, in" if op == "linear" else "in, out"
    return f"transpose it? `{op}` takes [{wanted}], so `{ast.unparse(operands[1][0])}.T` fits"
