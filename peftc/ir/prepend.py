"""Prepending rows to the token embeddings (prompt tuning, Lester et al. 2021).

The sequence grows by l at the very entry of the graph: token ids, masks, position ids and labels are lengthened
there, so that whatever the model computes from them (positions, causal masks, padding) is right of itself; the
embeddings of the l placeholder tokens are then replaced by the rows, and every output that has the sequence axis is
cut back to the length the caller knows. A pooler that takes the first token takes the caller's first token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from peftc.ir.builder import Builder, latest
from peftc.ir.program import Program, is_call

aten = torch.ops.aten

_FILL = {"labels": -100, "loss_labels": -100}
"""What the new places hold; a mask holds 1, anything else 0."""

_ENTRY = "input_ids"


def prepend(program: Program, builder: Builder, embeddings: fx.Node, rows: fx.Node) -> fx.Node:
    """Put `rows` [l, d_model] before `embeddings` [B, S, d_model]; returns the new embeddings [B, l + S, d_model]."""
    length = int(rows.meta["val"].shape[0])
    ids = program.placeholders("input")[_ENTRY]
    axis = ids.meta["val"].shape[1]
    for name, node in program.placeholders("input").items():
        if _has_axis(node, axis):
            _lengthen(builder, name, node, length)
    after = _replace_rows(program, builder, embeddings, rows, length)
    program.propagate()
    _shift_positions(program, axis, length)
    _cut_outputs(program, builder, axis, length)
    return after


def _has_axis(node: fx.Node, axis: Any) -> bool:
    value = node.meta["val"]
    size = value.shape[1] if value.dim() == 2 else 0
    return not isinstance(size, int) and size.node.hint == axis.node.hint  # each input has symbols of its own


def _lengthen(builder: Builder, name: str, node: fx.Node, length: int) -> None:
    value = node.meta["val"]
    batch = builder.size(node, 0)
    if name == "position_ids":
        extra = builder.call(aten.arange.default, length, dtype=value.dtype, device=value.device)
        extra = builder.call(aten.expand.default, builder.call(aten.unsqueeze.default, extra, 0), [batch, length])
        base = builder.call(aten.add.Scalar, node, length)
    else:
        fill = 1 if "mask" in name else _FILL.get(name, 0)
        extra = builder.call(aten.full.default, [batch, length], fill, dtype=value.dtype, device=value.device)
        base = node
    longer = builder.call(aten.cat.default, [extra, base], 1)
    own = set(builder.nodes)
    node.replace_all_uses_with(longer, delete_user_cb=lambda user: user not in own)


def _replace_rows(program: Program, builder: Builder, embeddings: fx.Node, rows: fx.Node, length: int) -> fx.Node:
    builder.cursor = latest(program.graph, [embeddings, builder.cursor])
    tail = builder.call(aten.slice.Tensor, embeddings, 1, length, 2**63 - 1)
    cast = builder.cast(rows, embeddings.meta["val"].dtype)
    head = builder.call(aten.unsqueeze.default, cast, 0)
    head = builder.call(aten.expand.default, head, [builder.size(embeddings, 0), -1, -1])
    joined = builder.call(aten.cat.default, [head, tail], 1)
    own = set(builder.nodes)
    embeddings.replace_all_uses_with(joined, delete_user_cb=lambda user: user not in own)
    return joined


def _shift_positions(program: Program, axis: Any, length: int) -> None:
    """A fixed position counted from the front (a pooler's first token) means a token of the caller's."""
    longer = (axis + length).node.expr
    for node in program.graph.nodes:
        if is_call(node, aten.select.int) and isinstance(node.args[2], int) and node.args[2] >= 0:
            size = node.args[0].meta["val"].shape[node.args[1]]
            if not isinstance(size, int) and size.node.expr == longer:
                node.update_arg(2, node.args[2] + length)


def _cut_outputs(program: Program, builder: Builder, axis: Any, length: int) -> None:
    output = program.output_node
    longer = (axis + length).node.expr
    results = list(output.args[0])  # pyright: ignore[reportArgumentType]
    for index, node in enumerate(results):
        value = node.meta["val"]  # pyright: ignore[reportAttributeAccessIssue]
        axes = [i for i, size in enumerate(value.shape) if not isinstance(size, int) and size.node.expr == longer]
        for i in axes:
            builder.cursor = output.prev
            node = builder.call(aten.slice.Tensor, node, i, length, 2**63 - 1)
        results[index] = node
    output.args = (tuple(results),)
