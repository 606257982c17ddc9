"""Calls of ops: how many arguments and which keywords an op takes, and what the equation of an einsum asks for."""

from __future__ import annotations

import ast

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.ops import OPS, Op
from peftc.lang.rule import Expr


def count(op: Op) -> str:
    """How many arguments `op` takes, in words."""
    low, high = op.arity
    if low == high:
        return "1 argument" if low == 1 else f"{low} arguments"
    return f"{low} to {high} arguments"


def check_arguments(expr: Expr, node: ast.expr, op: Op, collector: Collector) -> None:
    """E012 when a call of `op` has a wrong number of arguments, a wrong keyword, or an einsum its operands."""
    args = node.args if isinstance(node, ast.Call) else []
    if not op.arity[0] <= len(args) <= op.arity[1]:
        message = f"`{op.name}` takes {count(op)}, {len(args)} given"
        collector.error("E012", message, span=expr.span_of(node), help=f"{op.name}: {op.doc}")
        return
    seen: set[str] = set()
    for keyword in node.keywords if isinstance(node, ast.Call) else ():
        if keyword.arg in seen:
            message = f"`{keyword.arg}` is given twice"
            collector.error("E012", message, span=expr.span_of(keyword), help="give it once")
        elif keyword.arg is not None and keyword.arg not in op.keywords:
            known = did_you_mean(keyword.arg, op.keywords) or f"`{op.name}` takes no keywords"
            message = f"`{op.name}` has no keyword `{keyword.arg}`"
            collector.error("E012", message, span=expr.span_of(keyword), help=known)
        seen.add(keyword.arg or "")
    if op.name == "einsum":
        _check_einsum(expr, args, collector)


def _check_einsum(expr: Expr, args: list[ast.expr], collector: Collector) -> None:
    spec = args[0].value if isinstance(args[0], ast.Constant) else None
    span = expr.span_of(args[0])
    if not isinstance(spec, str):
        collector.error("E011", "the first argument of `einsum` is its equation", span=span, help=OPS["einsum"].doc)
    elif spec.partition("->")[0].count(",") + 2 != len(args):
        operands = spec.partition("->")[0].count(",") + 1
        message = f"the equation names {operands} operand{'s' if operands > 1 else ''}, {len(args) - 1} given"
        collector.error("E012", message, span=span, help=f"as in {OPS['einsum'].doc}")
