"""Sizes and conditions: computes a checked static expression over known names, without Python's `eval`.

>>> evaluate_static(parse("heads * head_dim // 2", mode="static"), {"heads": 12, "head_dim": 64})
384
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean, fail
from peftc.lang.grammar import MAX_EXPONENT
from peftc.lang.rule import Expr, Scalar, in_words

MAX_RESULT = 2**63

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def evaluate_static(expr: Expr, env: Mapping[str, Scalar]) -> Scalar:
    """The value of `expr` with the names of `env`; a quotient without remainder stays an integer.

    Raises `PeftcError`: E008 unknown name, E009 operands of wrong type, E011 a part that is not static,
    E014 division by zero, E017 a result beyond 2**63.
    """
    return _value(expr, expr.tree, env)


def _value(expr: Expr, node: ast.expr, env: Mapping[str, Scalar]) -> Scalar:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name):
            if name in env:
                return env[name]
            fail("E008", f"unknown name `{name}`", span=expr.span_of(node), help=did_you_mean(name, env))
        case ast.UnaryOp(op=ast.Not()):
            return not _value(expr, node.operand, env)
        case ast.UnaryOp(op=ast.USub()):
            return -_number(expr, node.operand, env)
        case ast.BinOp(op=op) if type(op) in _BINARY:
            return _binary(expr, node, env)
        case ast.BoolOp():
            return _boolean(expr, node, env)
        case ast.IfExp():
            return _value(expr, node.body if _value(expr, node.test, env) else node.orelse, env)
        case ast.Compare():
            return _compare(expr, node, env)
        case ast.Call(func=ast.Name(id="min" | "max" as name)):
            numbers = [_number(expr, argument, env) for argument in node.args]
            return min(numbers) if name == "min" else max(numbers)
        case ast.Call(func=ast.Name(id="len"), args=[argument]):
            return _length(expr, argument, env)
    diagnostic = Diagnostic(
        "E011",
        "this is not a static value",
        expr.span_of(node),
        "static: numbers, hyperparameters, arguments, dimensions",
    )
    raise PeftcError([diagnostic])


def _number(expr: Expr, node: ast.expr, env: Mapping[str, Scalar]) -> int | float:
    value = _value(expr, node, env)
    if not isinstance(value, (int, float)):
        fail("E009", f"`{ast.unparse(node)}` is {_shown(value)}, not a number", span=expr.span_of(node))
    return value


def _length(expr: Expr, node: ast.expr, env: Mapping[str, Scalar]) -> int:
    value = _value(expr, node, env)
    if not isinstance(value, tuple):
        what = f"{value}" if isinstance(value, (int, float)) else _shown(value)
        message = f"`{ast.unparse(node)}` is {what}, and `len` takes a list"
        fail("E009", message, span=expr.span_of(node), help="a list is a hyperparameter: ids: [11, 12, 40]")
    return len(value)


def _shown(value: Scalar) -> str:
    if isinstance(value, tuple):
        return f"the list {in_words(value)}"
    return "absent" if value is None else f"the word `{value}`"


def _binary(expr: Expr, node: ast.BinOp, env: Mapping[str, Scalar]) -> int | float:
    left, right = _number(expr, node.left, env), _number(expr, node.right, env)
    if isinstance(node.op, ast.Pow) and (abs(right) > MAX_EXPONENT or (left < 0 and not float(right).is_integer())):
        fail("E017", f"the power `{ast.unparse(node)}` is out of reach", span=expr.span_of(node))
    try:
        result = _BINARY[type(node.op)](left, right)
    except ZeroDivisionError:
        fail("E014", f"division by zero in `{ast.unparse(node)}`", span=expr.span_of(node))
    except OverflowError:
        result = MAX_RESULT + 1
    if not abs(result) <= MAX_RESULT:
        fail("E017", f"`{ast.unparse(node)}` is too large", span=expr.span_of(node))
    if isinstance(node.op, ast.Div) and isinstance(left, int) and isinstance(right, int) and left % right == 0:
        return left // right
    return result


def _boolean(expr: Expr, node: ast.BoolOp, env: Mapping[str, Scalar]) -> Scalar:
    stops_at = isinstance(node.op, ast.Or)
    value: Scalar = None
    for part in node.values:
        value = _value(expr, part, env)
        if bool(value) is stops_at:
            break
    return value


def _compare(expr: Expr, node: ast.Compare, env: Mapping[str, Scalar]) -> bool:
    left = _value(expr, node.left, env)
    for op, comparator in zip(node.ops, node.comparators, strict=True):
        right = _value(expr, comparator, env)
        ordering = not isinstance(op, (ast.Eq, ast.NotEq))
        if ordering and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            odd = right if isinstance(left, (int, float)) else left
            fail("E009", f"cannot order {_shown(odd)} by size", span=expr.span_of(node))
        if not _COMPARE[type(op)](left, right):
            return False
        left = right
    return True
