"""What a composition does with h and dh, where it is a h + b dh with numbers a and b.

>>> coefficients(parse("h + (alpha / r) * dh"), {"alpha": 16, "r": 8})
(1.0, 2.0)
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from peftc.diagnostics import PeftcError
from peftc.lang.expr import evaluate_static, name_nodes
from peftc.lang.rule import Expr, Scalar

Pair = tuple[float, float]


def coefficients(compose: Expr, sizes: Mapping[str, Scalar]) -> Pair | None:
    """(a, b) of a h + b dh; None for anything else. `sizes` are the numbers that the composition may name."""
    return _pair(compose, compose.tree, sizes)


def _pair(expr: Expr, node: ast.expr, sizes: Mapping[str, Scalar]) -> Pair | None:
    if isinstance(node, ast.Name) and node.id in ("h", "dh", "add"):
        return (1.0, 1.0) if node.id == "add" else (float(node.id == "h"), float(node.id == "dh"))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _scaled(_pair(expr, node.operand, sizes), -1.0)
    if not isinstance(node, ast.BinOp):
        return None
    if isinstance(node.op, (ast.Add, ast.Sub)):
        sign = 1.0 if isinstance(node.op, ast.Add) else -1.0
        left, right = _pair(expr, node.left, sizes), _scaled(_pair(expr, node.right, sizes), sign)
        return (left[0] + right[0], left[1] + right[1]) if left is not None and right is not None else None
    if isinstance(node.op, ast.Mult):
        for number, tensor in ((node.left, node.right), (node.right, node.left)):
            value = _number(expr, number, sizes)
            if value is not None:
                return _scaled(_pair(expr, tensor, sizes), value)
    return None


def _scaled(pair: Pair | None, by: float) -> Pair | None:
    return None if pair is None else (by * pair[0], by * pair[1])


def _number(expr: Expr, node: ast.expr, sizes: Mapping[str, Scalar]) -> float | None:
    if not name_nodes(Expr(expr.text, node)).keys() <= sizes.keys():
        return None
    try:
        value = evaluate_static(Expr(expr.text, node), sizes)
    except PeftcError:
        return None
    return float(value) if isinstance(value, (int, float)) else None
