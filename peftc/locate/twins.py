"""Attentions with the same queries, keys and mask over two sets of values, written as one over longer values.

    a = attend(q, k, v), b = attend(q, k, w)    ->  both = attend(q, k, cat([v, w], -1)), cut in two

Their weights are the same, so the result is: DiffLlama's heads, which take the difference of two halves, each see both
halves. As one they are one region, to which a prefix can be put. An attention is one op, or a softmax spelled out and
the product behind it. Not with dropout, which would become the same too.
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.ir.builder import Builder
from peftc.ir.program import Program, is_call, operand, shape_of
from peftc.locate.walk import DROPOUT, VIEWS, backward, skip_back

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCT = aten.matmul.default
_SAME = (*VIEWS, aten.repeat.default, aten.slice.Tensor)
_WEIGHTS = (*_SAME, *DROPOUT, _PRODUCT, aten.softmax.int, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor)


def join_twins(program: Program) -> None:
    """Rewrite such attentions; the values stay."""
    groups: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if is_call(node, _ATTENTION) and not _drops(node, 4):
            rest = [_spelled(argument, _SAME) for place, argument in enumerate(node.args) if place != 2]
            groups.setdefault(repr((rest, sorted(node.kwargs.items()))), []).append(node)
        elif is_call(node, _PRODUCT) and is_call(skip_back(operand(node, 0)), aten.softmax.int):
            groups.setdefault(_spelled(node.args[0], _WEIGHTS), []).append(node)
    for several in groups.values():
        values = [operand(node, _place(node)) for node in several]
        if len(several) > 1 and _alike(values) and _made_before(several[0], values):
            _join(program, several, values)


def _place(node: fx.Node) -> int:
    """Which operand of an attention, or of a product with its weights, the values are."""
    return 2 if is_call(node, _ATTENTION) else 1


def _spelled(argument: object, through: tuple[object, ...]) -> str:
    """An operand by what it is made of and how: each call may repeat the same keys for its groups by itself."""
    if not isinstance(argument, fx.Node) or not is_call(argument, *through):
        return repr(argument)
    if is_call(argument, *DROPOUT) and _drops(argument, 1):
        return repr(argument)
    return f"{argument.target}({[_spelled(part, through) for part in argument.args]}, {argument.kwargs})"


def _made_before(first: fx.Node, values: list[fx.Node]) -> bool:
    """Bring what makes the values in front of the first attention, where none of them comes from it."""
    late = {node for node in backward(values, lambda node: node < first) if not node < first}
    if first in late:
        return False
    for node in sorted(late):
        first.prepend(node)
    return True


def _drops(node: fx.Node, place: int) -> bool:
    return bool(node.args[place] if len(node.args) > place else node.kwargs.get("dropout_p", 0.0))


def _alike(values: list[fx.Node]) -> bool:
    shapes = {str(shape_of(value)[:-1]) for value in values}
    return len(shapes) == 1 and len(set(values)) == len(values)


def _join(program: Program, several: list[fx.Node], values: list[fx.Node]) -> None:
    first, place = several[0], _place(several[0])
    builder = Builder(program, first.prev, label="", like=first)
    longer = builder.call(aten.cat.default, values, -1)
    both = builder.call(first.target, *first.args[:place], longer, *first.args[place + 1 :], **first.kwargs)
    start = 0
    for node, value in zip(several, values, strict=True):
        end = start + int(shape_of(value)[-1])
        node.replace_all_uses_with(builder.call(aten.slice.Tensor, both, -1, start, end))
        _erase(program.graph, node)
        start = end
    for written in builder.nodes:
        written.meta.pop("custom")


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take out a node and what fed nothing else: the second softmax of two that are the same."""
    feeding = node.all_input_nodes
    graph.erase_node(node)
    for before in feeding:
        if before.op == "call_function" and not before.users:
            _erase(graph, before)
