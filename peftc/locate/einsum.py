"""Einsums of two operands that are a product of matrices, written as one: `permute, matmul, permute`."""

from __future__ import annotations

import string

import torch
from torch import fx

from peftc.ir.builder import Builder
from peftc.ir.program import Program, shape_of

aten = torch.ops.aten


def letters_of(node: fx.Node) -> tuple[str, str, str, fx.Node, fx.Node] | None:
    """The letters of both operands and of the result, and the operands; None for another number of operands.

    Axes that `...` stands for get letters of their own.
    """
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    a, b = operands
    if not arrow or len(sides) != 2 or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [len(shape_of(value)) - len(side.replace("...", "")) for value, side in ((a, sides[0]), (b, sides[1]))]
    if "..." in equation and (not all("..." in side for side in sides) or counts[0] != counts[1]):
        return None
    dots = "".join(free[: counts[0]]) if "..." in equation else ""
    first, second, result = (side.replace("...", dots) for side in (*sides, out))
    return first, second, result, a, b


def einsum_to_matmul(program: Program, node: fx.Node) -> None:
    """Rewrite `node` where one axis is summed over and the second operand has one axis of its own; the values stay.

    Where batch and heads are common to both, the first operand may have several axes of its own, as queries that are
    cut into blocks have.
    """
    read = letters_of(node)
    if read is None:
        return
    first, second, result, a, b = read
    if any(program.parameter_name(operand) for operand in (a, b)) or len({*first}) + len({*second}) != len(
        first + second
    ):
        return
    batch = [letter for letter in first if letter in second and letter in result]
    summed = [letter for letter in first if letter in second and letter not in result]
    rows = [letter for letter in first if letter not in second]
    columns = [letter for letter in second if letter not in first]
    plain = len(rows) == 1 or (len(rows) > 1 and len(batch) > 1)
    if len(summed) != 1 or not plain or len(columns) != 1 or {*result} != {*batch, *rows, *columns}:
        return
    builder = Builder(program, node.prev, label="", like=node)
    left = _permuted(builder, a, first, [*batch, *rows, *summed])
    right = _permuted(builder, b, second, [*batch, *summed, *columns])
    for _ in rows[1:]:
        right = builder.call(aten.unsqueeze.default, right, len(batch))
    product = builder.call(aten.matmul.default, left, right)
    value = _permuted(builder, product, "".join([*batch, *rows, *columns]), list(result))
    for written in builder.nodes:
        written.meta.pop("custom")
    node.replace_all_uses_with(value)
    program.graph.erase_node(node)


def _permuted(builder: Builder, node: fx.Node, axes: str, wanted: list[str]) -> fx.Node:
    order = [axes.index(letter) for letter in wanted]
    return node if order == sorted(order) else builder.call(aten.permute.default, node, order)
