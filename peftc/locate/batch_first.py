"""Attention that runs with the sequence in front, as `torch.nn.MultiheadAttention` does, written with the batch first.

A linear layer treats every row alone, so rows may change places before it or after it. Two spellings are brought to
the one that most models have:

    linear(transpose(x, 0, 1))                          ->  transpose(linear(x), 0, 1)
    view(linear(view(transpose(heads, 0, 1))))          ->  transpose(linear(view(transpose(heads, 1, 2))), 0, 1)
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.ir.axis_names import axis_names
from peftc.ir.builder import Builder
from peftc.ir.program import Program, is_call, operand, shape_of

aten = torch.ops.aten

_FLATTENED = (aten.view.default, aten.reshape.default)
_HEADS = (aten.bmm.default, aten.scaled_dot_product_attention.default)


def batch_first(program: Program) -> None:
    """Rewrite both spellings; the values stay, but for the order in which a kernel takes the rows."""
    batch = {symbol for symbol, name in axis_names(program).items() if name == "B"}
    for node in list(program.graph.nodes):
        if not is_call(node, aten.linear.default):
            continue
        source = operand(node, 0)
        if _swaps_rows(source) and len(shape_of(source)) == 3 and str(shape_of(source)[1]) in batch:
            _after(program, node, source)
        elif len(shape_of(source)) == 2 and (heads := _heads_behind(source)) is not None:
            _merged(program, node, heads, batch)


def _swaps_rows(node: fx.Node) -> bool:
    return is_call(node, aten.transpose.int) and set(node.args[1:]) == {0, 1}


def _after(program: Program, linear: fx.Node, source: fx.Node) -> None:
    builder = Builder(program, linear.prev, label="", like=linear)
    value = builder.call(aten.linear.default, operand(source, 0), *linear.args[1:])
    _replace(program, builder, linear, builder.call(aten.transpose.int, value, 0, 1))


def _heads_behind(rows: fx.Node) -> fx.Node | None:
    """The heads [B, heads, S, d] or [B * heads, S, d] that the rows [S * B, heads * d] are."""
    node = operand(rows, 0) if is_call(rows, *_FLATTENED) else rows
    while is_call(node, aten.contiguous.default, aten.clone.default):
        node = operand(node, 0)
    whole = is_call(node, aten.permute.default) and list(node.args[1]) == [2, 0, 1, 3]  # pyright: ignore[reportArgumentType]
    if not (whole or (_swaps_rows(node) and len(shape_of(node)) == 3)):
        return None
    heads = operand(node, 0)
    return heads if is_call(heads, *_HEADS) else None


def _merged(program: Program, linear: fx.Node, heads: fx.Node, batch: set[str]) -> None:
    users = list(linear.users)
    if len(users) != 1 or not is_call(users[0], *_FLATTENED) or len(shape_of(users[0])) != 3:
        return
    unfolded, width = users[0], int(shape_of(operand(linear, 0))[-1])
    if str(shape_of(unfolded)[1]) not in batch:
        return
    builder = Builder(program, linear.prev, label="", like=linear)
    if len(shape_of(heads)) == 3:
        count, size = width // int(shape_of(heads)[-1]), builder.size(heads, 1)
        heads = builder.reshape(heads, [-1, count, size, shape_of(heads)[-1]])
    rows = builder.call(aten.transpose.int, heads, 1, 2)
    concat = builder.call(aten.flatten.using_ints, rows, -2, -1)
    value = builder.call(aten.linear.default, concat, *linear.args[1:])
    _replace(program, builder, unfolded, builder.call(aten.transpose.int, value, 0, 1))


def _replace(program: Program, builder: Builder, old: fx.Node, new: fx.Node) -> None:
    """Read `new` for `old`; where `old` was only turned back, read what was turned. What is turned has to be copied
    before its axes can be merged, as `view` would not.
    """
    for written in builder.nodes:
        written.meta.pop("custom")
    for user in list(old.users):
        if _swaps_rows(user):
            user.replace_all_uses_with(operand(new, 0))
            program.graph.erase_node(user)
    for user in old.users:
        if is_call(user, aten.view.default):
            user.target = aten.reshape.default
    old.replace_all_uses_with(new)
    program.graph.erase_node(old)
