"""Attentions with the same queries, keys and mask over two sets of values, written as one over longer values.

    a = attend(q, k, v), b = attend(q, k, w)    ->  both = attend(q, k, cat([v, w], -1)), cut in two

Their weights are the same, so the result is: DiffLlama's heads, which take the difference of two halves, each see both
halves. As one op they are one region, to which a prefix can be put. Not with dropout, which would become the same too.
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.ir.builder import Builder
from peftc.ir.program import Program, is_call, operand, shape_of
from peftc.locate.walk import VIEWS, backward

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default


def join_twins(program: Program) -> None:
    """Rewrite such attentions; the values stay."""
    groups: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if is_call(node, _ATTENTION) and not _dropout(node):
            rest = [_spelled(argument) for place, argument in enumerate(node.args) if place != 2]
            groups.setdefault(repr((rest, sorted(node.kwargs.items()))), []).append(node)
    for several in groups.values():
        values = [operand(node, 2) for node in several]
        if len(several) > 1 and _alike(values) and _made_before(several[0], values):
            _join(program, several, values)


def _spelled(argument: object) -> str:
    """An operand by what it is a view of and how: each call may repeat the same keys for its groups by itself."""
    if isinstance(argument, fx.Node) and is_call(argument, *VIEWS, aten.repeat.default, aten.slice.Tensor):
        return f"{argument.target}({_spelled(argument.args[0])}, {argument.args[1:]}, {argument.kwargs})"
    return repr(argument)


def _made_before(first: fx.Node, values: list[fx.Node]) -> bool:
    """Bring what makes the values in front of the first attention, where none of them comes from it."""
    late = {node for node in backward(values, lambda node: node < first) if not node < first}
    if first in late:
        return False
    for node in sorted(late):
        first.prepend(node)
    return True


def _dropout(node: fx.Node) -> bool:
    return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))


def _alike(values: list[fx.Node]) -> bool:
    shapes = {str(shape_of(value)[:-1]) for value in values}
    return len(shapes) == 1 and len(set(values)) == len(values)


def _join(program: Program, several: list[fx.Node], values: list[fx.Node]) -> None:
    first = several[0]
    builder = Builder(program, first.prev, label="", like=first)
    longer = builder.call(aten.cat.default, values, -1)
    both = builder.call(_ATTENTION, *first.args[:2], longer, *first.args[3:], **first.kwargs)
    start = 0
    for node, value in zip(several, values, strict=True):
        end = start + int(shape_of(value)[-1])
        node.replace_all_uses_with(builder.call(aten.slice.Tensor, both, -1, start, end))
        program.graph.erase_node(node)
        start = end
    for written in builder.nodes:
        written.meta.pop("custom")
