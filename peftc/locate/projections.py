"""Projections: what queries, keys and values are made by, and what merges the heads.

Most are linear layers. A convolution whose kernel is one position long is the same function with its channels in
front (SqueezeBERT); an einsum with a weight of the checkpoint is one whose weight is not flat (XLNet). A delta on an
activation finds its tap at any of them; a weight is a `linear` site at the first kind alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from peftc.ir.axis_names import axis_names
from peftc.ir.program import Program, is_call, operand, shape_of
from peftc.ir.sites import Layout, Linear, Tap
from peftc.locate.einsum import letters_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Projection:
    """`node` is made from `x` by the weight of that name; `linear` is the layer where it is one."""

    node: fx.Node
    x: fx.Node
    d_in: int
    weight_name: str
    x_layout: Layout = "flat"
    layout: Layout = "flat"
    linear: Linear | None = None

    def input_tap(self, name: str) -> Tap:
        return Tap(name, self.x, self.x_layout)

    def output_tap(self, name: str) -> Tap:
        return Tap(name, self.node, self.layout)


Projections = Mapping[fx.Node, Projection]


def find_projections(program: Program, linears: Mapping[fx.Node, Linear]) -> dict[fx.Node, Projection]:
    """Every projection of the graph by its output, in graph order."""
    batch = {symbol for symbol, name in axis_names(program).items() if name == "B"}
    found: dict[fx.Node, Projection] = {}
    for node in program.graph.nodes:
        if node in linears:
            found[node] = _of_linear(linears[node], batch)
        elif is_call(node, aten.conv1d.default):
            one = _of_convolution(program, node)
            found.update({} if one is None else {node: one})
        elif is_call(node, aten.einsum.default):
            one = _of_einsum(program, node, batch)
            found.update({} if one is None else {node: one})
    return found


def rows_layout(node: fx.Node, batch: set[str]) -> Layout:
    """Whether a hidden state lies as [B, S, d] or as [S, B, d]."""
    sizes = [str(size) for size in shape_of(node)]
    return "sbd" if len(sizes) == 3 and sizes[1] in batch and sizes[0] not in batch else "flat"


def _of_linear(linear: Linear, batch: set[str]) -> Projection:
    layout = rows_layout(linear.node, batch)
    return Projection(linear.node, linear.x, linear.d_in, linear.weight_name, layout, layout, linear)


def _of_convolution(program: Program, node: fx.Node) -> Projection | None:
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or (name := program.parameter_name(weight)) is None:
        return None
    x, kernel = operand(node, 0), shape_of(weight)
    plain = shape_of(node)[-1] == shape_of(x)[-1] and kernel[-1] == 1 and kernel[1] > 1
    return Projection(node, x, int(shape_of(x)[1]), name, "bds", "bds") if plain else None


_LAYOUTS: dict[str, Layout] = {"bsd": "flat", "sbd": "sbd", "bshd": "bshd", "sbhd": "sbhd", "bhsd": "bhsd"}


def _of_einsum(program: Program, node: fx.Node, batch: set[str]) -> Projection | None:
    read = letters_of(node)
    if read is None:
        return None
    first, second, result, x, weight = read
    name = program.parameter_name(weight)
    rows = [letter for letter in first if letter in result]
    if name is None or len(rows) != 2 or any(letter in second for letter in rows):
        return None
    in_front = str(shape_of(x)[first.index(rows[0])]) in batch
    names = dict(zip(rows, "bs" if in_front else "sb", strict=True))
    before, after = _LAYOUTS.get(_named(first, names)), _LAYOUTS.get(_named(result, names))
    if before is None or after is None:
        return None
    width = 1
    for letter in first:
        width *= 1 if letter in rows else int(shape_of(x)[first.index(letter)])
    return Projection(node, x, width, name, before, after)


def _named(side: str, rows: Mapping[str, str]) -> str:
    """The axes of an operand by their names; what is no row is the width, or heads and width."""
    inner = iter("hd" if len(side) == 4 else "d")
    return "".join(rows[letter] if letter in rows else next(inner, "?") for letter in side)
