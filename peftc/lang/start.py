"""What a row does before any training, from its expressions alone: rows that surely change the model's outputs.

A value is followed by the random tensors it is not constant in. `h + linear(relu(linear(x, A)), B)` with random A and
B is not constant in B, so it is not h, whatever the model and the input (but for a set of values of probability 0).
Nothing is said of what is not known: other ops, dimensions in conditions, cancelling terms. No torch is imported.

    changes_outputs(delta, rule.values)     # "`B` starts at random", or None
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from peftc.diagnostics import PeftcError
from peftc.lang.rule import Delta, Expr, Param, Scalar
from peftc.lang.sites import DIMS, TAPS
from peftc.lang.static import evaluate_static

_RANDOM = frozenset({"normal", "uniform", "kaiming_uniform", "kaiming_normal", "xavier_uniform"})
_CONSTANT = frozenset({"ones", "constant", "eye"})
_SAME = frozenset(
    {"transpose", "permute", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "repeat", "roll",
     "flip", "split_heads", "merge_heads", "identity", "dropout", "detach"}
)  # fmt: skip
"""Ops that move the entries of their first argument."""
_FROM_ZERO = frozenset({"relu", "gelu", "gelu_tanh", "silu", "tanh"})
"""Ops with f(0) = 0."""
_NOT_ZERO = frozenset({"orthonormal", "norm", "exp"})
"""Ops that are not zero where their argument is not."""
_PRODUCTS = frozenset({"linear", "matmul", "einsum", "outer", "kron"})


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a value. `random`: tensors it is surely not constant in; `reads`: all that it may depend on."""

    zero: bool = False
    nonzero: bool = False
    random: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()


_GIVEN = _Value(nonzero=True)
"""h, x and other values of the model."""


def changes_outputs(delta: Delta, values: Mapping[str, Scalar]) -> str | None:
    """Why the row surely changes what it modifies at its initial values, in a few words; None where nothing is sure.

    `values` are the hyperparameters.
    """
    compose = delta.compose.text
    if compose == "prepend":
        return "rows are put before the input"
    if compose == "gate":
        return "attention is shared with the trained rows from the start"
    row = _Row(delta, values)
    result = row.composed(None if compose == "add" else delta.compose)
    if not result.random:
        return None
    names = sorted(result.random)
    return f"`{'`, `'.join(names)}` start{'s' if len(names) == 1 else ''} at random"


class _Row:
    """One row with its names: sizes and words in `statics`, values in `known`; any other name is not known."""

    def __init__(self, delta: Delta, values: Mapping[str, Scalar]) -> None:
        self.delta = delta
        self.statics: dict[str, Scalar] = {
            **{name: given for name, given in delta.form.args.items() if name not in values}, **values
        }  # fmt: skip
        for name, given in delta.arguments.items():
            found = self._static(given) if isinstance(given, Expr) else given
            self.statics.pop(name, None)
            if found is not None:
                self.statics[name] = found
        taps = dict.fromkeys((*TAPS, "x", "h"), _GIVEN)
        sizes = {name: _GIVEN for name in DIMS if name not in ("layer", "has_bias")}
        self.known: dict[str, _Value | None] = {**taps, **sizes}
        for param in (*delta.form.params, *delta.params):
            self.known[param.name] = self._param(param)
        for name, source in delta.sources.items():  # a carried value may start at zero
            self.known[name] = _GIVEN if all(choice.tap for choice in source.choices) else None

    def composed(self, compose: Expr | None) -> _Value:
        """What `compose` makes of h and dh; None stands for h + dh."""
        for name, expr in self.delta.form.let.items():
            self.known[name] = self.value(expr.tree)
        form = self.delta.form
        if form.attend is not None:
            dh = self.value(form.attend.values.tree)  # a mean of the rows: zero with them
        else:
            dh = self.value(form.dh.tree) if form.dh is not None else _Value()
        self.known["dh"] = dh
        for name, expr in self.delta.let.items():
            self.known[name] = self.value(expr.tree)
        if compose is None:
            return _sum(_GIVEN, dh or _Value())
        return self.value(compose.tree) or _Value()

    def _static(self, expr: Expr) -> Scalar:
        try:
            return evaluate_static(expr, self.statics)
        except PeftcError:
            return None

    def _condition(self, node: ast.expr) -> bool | None:
        """Whether a condition holds; None where it reads what is not known."""
        try:
            return bool(evaluate_static(Expr(ast.unparse(node), node), self.statics))
        except PeftcError:
            return None

    def _param(self, param: Param) -> _Value | None:
        own = frozenset({param.name})
        if param.condition is not None:
            holds = self._condition(param.condition.tree)
            if not holds:
                return None if holds is False else _Value(reads=own)
        tree = param.init.tree
        name = tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else param.init.text
        number = tree.args[0] if isinstance(tree, ast.Call) and tree.args else tree
        size = self.value(number) if name not in ("zeros", "ones", "eye") else None
        if name == "zeros" or (size is not None and size.zero):
            return _Value(zero=True, reads=own)
        spread = not isinstance(tree, ast.Call) or not tree.args or (size is not None and size.nonzero)
        if name in _RANDOM and spread:
            return _Value(nonzero=True, random=own, reads=own)
        if (name in _CONSTANT and spread) or (not isinstance(tree, ast.Call) and size is not None and size.nonzero):
            return _Value(nonzero=True, reads=own)
        return _Value(reads=own)

    def value(self, node: ast.expr) -> _Value | None:
        """What is known of an expression; None for a parameter that is not there."""
        match node:
            case ast.Constant(value=bool() | str() | None):
                return _Value()
            case ast.Constant(value=int() | float() as number):
                return _Value(zero=number == 0, nonzero=number != 0)
            case ast.Name(id=name):
                return self._name(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand) | ast.Attribute(value=operand, attr="T"):
                return self.value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(op, self.value(left) or _Value(), self.value(right) or _Value())
            case ast.IfExp(test=test, body=body, orelse=orelse):
                holds = self._condition(test)
                return self._unknown(node) if holds is None else self.value(body if holds else orelse)
            case ast.Call(func=ast.Name(id=name), args=args):
                return self._call(name, args, node)
        return self._unknown(node)

    def _name(self, name: str) -> _Value | None:
        if name in self.statics:
            number = self.statics[name]
            plain = isinstance(number, (int, float)) and not isinstance(number, bool)
            return _Value(zero=plain and number == 0, nonzero=plain and number != 0)
        return self.known.get(name, _Value())

    def _binary(self, op: ast.operator, left: _Value, right: _Value) -> _Value:
        if isinstance(op, (ast.Add, ast.Sub)):
            return _sum(left, right)
        if isinstance(op, (ast.Mult, ast.MatMult)):
            return _product(left, right)
        if isinstance(op, ast.Div):
            found = _product(left, right)
            return _Value(left.zero, found.nonzero, found.random, found.reads)
        return _Value(nonzero=left.nonzero and isinstance(op, ast.Pow), reads=left.reads | right.reads)

    def _call(self, name: str, args: list[ast.expr], node: ast.expr) -> _Value:
        word = self.statics.get(name)
        name = word if isinstance(word, str) else name
        given = [self.value(arg) for arg in args if not (isinstance(arg, ast.Constant) and isinstance(arg.value, str))]
        values = [value or _Value() for value in given]
        if name in _SAME and values:
            return values[0]
        if name in _FROM_ZERO and len(values) == 1:
            return values[0]
        if name in _NOT_ZERO and len(values) == 1:
            return _Value(nonzero=values[0].nonzero, reads=values[0].reads)
        if name == "sigmoid" and len(values) == 1:
            return _Value(nonzero=True, random=values[0].random, reads=values[0].reads)
        if name in _PRODUCTS and len(values) >= 2:
            bias = given[2] if name == "linear" and len(given) == 3 else None
            factors = values[:2] if name == "linear" else values
            found = factors[0]
            for factor in factors[1:]:
                found = _product(found, factor)
            return found if bias is None else _sum(found, bias)
        return self._unknown(node)

    def _unknown(self, node: ast.AST) -> _Value:
        """Nothing is known but what it may depend on."""
        names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        found = [self.known.get(name) for name in names]
        return _Value(reads=frozenset().union(*(value.reads for value in found if value is not None)))


def _sum(left: _Value, right: _Value) -> _Value:
    """A sum, or a difference: not constant in what one side is not constant in and the other does not read."""
    random = (left.random - right.reads) | (right.random - left.reads)
    nonzero = bool(random) or (left.nonzero and right.zero) or (right.nonzero and left.zero)
    return _Value(left.zero and right.zero, nonzero, random, left.reads | right.reads)


def _product(left: _Value, right: _Value) -> _Value:
    """A product of any kind: not constant in what one factor is not constant in, where the other is not zero."""
    random = (left.random - right.reads if right.nonzero else frozenset()) | (
        right.random - left.reads if left.nonzero else frozenset()
    )
    return _Value(left.zero or right.zero, left.nonzero and right.nonzero, random, left.reads | right.reads)
