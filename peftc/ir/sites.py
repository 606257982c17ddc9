"""Sites and taps: where in a graph a delta can be put.

A *site* is a place found by dataflow (an attention, an FFN, a linear layer, ...); a *tap* is a named value of it,
the representation that a delta reads or modifies. A tap remembers the layout its node has in the graph; `read`
gives the value in the canonical layout that rules are written against ([.., d] for most taps, [B, heads, S,
head_dim] for `heads`, [d_out, d_in] for weights) and `write` puts a new value in its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

from peftc.ir.program import is_call, shape_of
from peftc.ir.program import operand as argument_node

if TYPE_CHECKING:
    from peftc.ir.attention import Region
    from peftc.ir.builder import Builder
    from peftc.ir.program import Program

aten = torch.ops.aten
_INDEX = re.compile(r"(?<![^.])\d+(?=\.|$)")


def without_indices(path: str) -> str:
    """A path of modules with `*` for each index."""
    return _INDEX.sub("*", path)


Layout = Literal["flat", "bshd", "bhsd", "sbhd", "sbd", "bds", "transposed"]
"""flat: as it is; letters: its axes in order, batch, sequence, heads and width, where a flat value is [b, s, h * d];
transposed: a weight stored [.., in, out]."""


@dataclass(frozen=True, slots=True)
class Tap:
    """A named value of a site. `user` limits a replacement to one consumer (a weight that is tied elsewhere).

    `stacked` says that a parameter holds one weight or bias for each expert along its first axis.
    """

    name: str
    node: fx.Node
    layout: Layout = "flat"
    user: fx.Node | None = None
    stacked: bool = False

    def current(self, program: Program) -> fx.Node:
        """The node that carries the tap's value now."""
        if self.user is not None:
            return program.replaced_at.get((self.node, self.user)) or program.current(self.node)
        return program.current(self.node)

    def read(self, program: Program, builder: Builder) -> fx.Node:
        """The tap's value in canonical layout (new nodes only when the graph holds another layout)."""
        node = self.current(program)
        if self.layout == "flat":
            return node
        if self.layout == "transposed":
            return builder.call(aten.transpose.int, node, -2, -1)
        node = _permuted(builder, node, [self.layout.index(axis) for axis in "bshd" if axis in self.layout])
        return builder.call(aten.flatten.using_ints, node, -2, -1) if "h" in self.layout else node

    def write(
        self, program: Program, builder: Builder, value: fx.Node, held: Collection[fx.Node] = frozenset()
    ) -> fx.Node:
        """Make every user of the tap but `held` read `value` (canonical layout); the node that replaced the tap's.

        `value` must be a node of its own: one that carries another tap too would be changed with it from then on.
        """
        old = self.current(program)
        if self.layout == "transposed":
            value = builder.call(aten.transpose.int, value, -2, -1)
        elif self.layout != "flat":
            if "h" in self.layout:
                sizes = [shape_of(self.node)[self.layout.index(axis)] for axis in "hd"]
                value = builder.call(aten.unflatten.int, value, -1, sizes)
            order = [axis for axis in "bshd" if axis in self.layout]
            value = _permuted(builder, value, [order.index(axis) for axis in self.layout])
        own = {*builder.nodes, *held}
        if self.user is not None:
            self.user.replace_input_with(old, value)
            program.replaced_at[self.node, self.user] = value
        else:
            old.replace_all_uses_with(value, delete_user_cb=lambda user: user not in own)
            program.replaced[old] = value
        return value

    @property
    def is_parameter(self) -> bool:
        """Whether the value is a weight or a bias, which is replaced for its one consumer."""
        return self.user is not None and self.node.op == "placeholder"

    @property
    def anchor(self) -> fx.Node:
        """The node that says where in the graph the tap is: of a parameter the one that reads it."""
        return self.user if self.user is not None and self.is_parameter else self.node

    @property
    def width(self) -> int:
        """The last axis of the canonical value; 0 where that is the sequence."""
        shape = shape_of(self.node)
        if not shape or (self.layout in ("flat", "transposed") and not isinstance(shape[-1], int)):
            return 0
        if self.layout == "transposed":
            return int(shape[-2])
        if self.layout == "flat":
            return int(shape[-1])
        return math.prod(int(shape[self.layout.index(axis)]) for axis in "hd" if axis in self.layout)

    @property
    def canonical_shape(self) -> tuple[object, ...]:
        shape = shape_of(self.node)
        if self.layout == "transposed":
            return (*shape[:-2], shape[-1], shape[-2])
        if self.layout == "flat":
            return shape
        return (*(shape[self.layout.index(axis)] for axis in "bs"), self.width)


def _permuted(builder: Builder, node: fx.Node, order: list[int]) -> fx.Node:
    """The axes in another order, by a transpose where two change places."""
    moved = [place for place, axis in enumerate(order) if place != axis]
    if not moved:
        return node
    if len(moved) == 2:
        return builder.call(aten.transpose.int, node, *moved)
    return builder.call(aten.permute.default, node, order)


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product with a weight of the checkpoint: `node` = x Wᵀ + b.

    `transposed` says that the checkpoint stores the weight as [in, out] (GPT-2's Conv1D).
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    weight_name: str
    transposed: bool
    bias: fx.Node | None
    bias_name: str | None
    weight_operand: fx.Node
    """The operand of `node` that carries the weight: the placeholder, or its transpose."""

    @property
    def d_in(self) -> int:
        return int(shape_of(self.weight)[0 if self.transposed else 1])

    @property
    def d_out(self) -> int:
        return int(shape_of(self.weight)[1 if self.transposed else 0])


def as_linear(program: Program, node: fx.Node) -> Linear | None:
    """`node` read as a linear layer with a checkpoint weight, or None."""
    if not is_call(node, aten.linear.default):
        return None
    operand = node.args[1]
    if not isinstance(operand, fx.Node) or not isinstance(node.args[0], fx.Node):
        return None
    weight, transposed = operand, False
    while is_call(weight, aten.transpose.int, aten.t.default):
        weight, transposed = argument_node(weight, 0), not transposed
    name = program.parameter_name(weight)
    if name is None or weight.meta["val"].dim() != 2:
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    bias = bias if isinstance(bias, fx.Node) else None
    bias_name = program.parameter_name(bias) if bias is not None else None
    return Linear(node, argument_node(node, 0), weight, name, transposed, bias, bias_name, operand)


@dataclass(slots=True)
class Site:
    """A place of one kind with its taps and dimensions.

    `kind` is one of `peftc.lang.sites.SITES`; `variant` is "self" or "cross" for an attention. `layer` counts blocks
    within a tower of a `stack` ("encoder" or "decoder"), -1 outside of any block. `linears` are the site's own
    projections by role.
    """

    kind: str
    path: str
    taps: dict[str, Tap]
    dims: dict[str, int | bool] = field(default_factory=dict)
    layer: int = -1
    stack: str = "encoder"
    variant: str = ""
    causal: bool = False
    role: str = ""
    block: str = ""
    linears: dict[str, Linear] = field(default_factory=dict)
    region: Region | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Why a tap that such a site may have is not here."""
    identity: tuple[str, ...] = ()
    """What tells sites under one path apart, where their linear layers do not."""
    series: dict[str, tuple[Tap, ...]] = field(default_factory=dict)
    """Taps that are several values of one kind, such as the outputs of a model; `taps` holds the first."""

    @property
    def tower(self) -> str:
        """What tells the layers of one tower from those of another: the path of the site's block without indices."""
        return without_indices(self.block)

    @property
    def anchor(self) -> fx.Node:
        """The node that says where in the graph the site is."""
        return (self.taps.get("out") or next(iter(self.taps.values()))).anchor

    def describe(self) -> str:
        words = [self.kind]
        if self.variant:
            words.insert(0, self.variant)
        return f"{' '.join(words)} {self.path or '(root)'}"
