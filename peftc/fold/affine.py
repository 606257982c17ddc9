"""The affine domain: an abstract interpretation of a delta's subgraph.

Every node is one of

- `Constant`: it depends on parameters alone;
- `Affine`: for each token by itself, an affine function of the streams (h, x, ...) it reads, row by row
  (`y = h B + x A + c`); `unit` streams have the identity as coefficient, `offset` says whether c may be nonzero;
- `Opaque`: anything else, with the op that made it so.

The domain is what makes folding exact: where h' is affine, B, A and c follow from running the subgraph on the
identity matrix and on zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from peftc.ir.program import is_call

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Constant:
    """A function of parameters alone."""


@dataclass(frozen=True, slots=True)
class Affine:
    """An affine function of `streams`, token by token."""

    streams: frozenset[str]
    unit: frozenset[str] = frozenset()
    offset: bool = False


@dataclass(frozen=True, slots=True)
class Opaque:
    """Not affine; `culprit` is the first op that is not, in the order of the graph."""

    culprit: fx.Node
    streams: frozenset[str]


Kind = Constant | Affine | Opaque

_SAME = (
    aten.to.dtype, aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.alias.default,
    aten._to_copy.default, aten.detach.default,
)  # fmt: skip
"""The identity, in evaluation."""


def classify(nodes: Iterable[fx.Node], streams: Mapping[fx.Node, str], program_constants: set[fx.Node]) -> dict[fx.Node, Kind]:
    """The kind of every node of a subgraph, given the nodes that are its streams and those that are parameters."""
    kinds: dict[fx.Node, Kind] = {}
    for node in program_constants:
        kinds[node] = Constant()
    for node, name in streams.items():
        kinds[node] = Affine(frozenset({name}), frozenset({name}))
    for node in nodes:
        if node not in kinds:
            kinds[node] = _transfer(node, kinds)
    return kinds


def _transfer(node: fx.Node, kinds: Mapping[fx.Node, Kind]) -> Kind:
    operands = [kinds.get(operand) for operand in node.all_input_nodes]
    if any(kind is None for kind in operands):
        return Opaque(node, frozenset())
    known = [kind for kind in operands if kind is not None]
    if all(isinstance(kind, Constant) for kind in known):
        return Constant()
    read = frozenset().union(*(kind.streams for kind in known if not isinstance(kind, Constant)))
    blocked = next((kind for kind in known if isinstance(kind, Opaque)), None)
    if blocked is not None:
        return Opaque(blocked.culprit, read | blocked.streams)
    result = _affine(node, kinds)
    return result if result is not None else Opaque(node, read)


def _affine(node: fx.Node, kinds: Mapping[fx.Node, Kind]) -> Affine | None:
    first = _kind(node, 0, kinds)
    if is_call(node, *_SAME):
        return first if isinstance(first, Affine) else None
    if is_call(node, aten.neg.default) and isinstance(first, Affine):
        return Affine(first.streams, offset=first.offset)
    if is_call(node, aten.linear.default):
        constant = all(isinstance(_kind(node, i, kinds), (Constant, type(None))) for i in (1, 2))
        biased = len(node.args) > 2 and node.args[2] is not None
        return Affine(first.streams, offset=first.offset or biased) if isinstance(first, Affine) and constant else None
    if is_call(node, aten.matmul.default):
        matrix = isinstance(_kind(node, 1, kinds), Constant) and node.args[1].meta["val"].dim() == 2  # type: ignore[union-attr]
        return Affine(first.streams, offset=first.offset) if isinstance(first, Affine) and matrix else None
    if is_call(node, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        return _sum(node, kinds)
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return _scale(node, kinds)
    return None


def _kind(node: fx.Node, index: int, kinds: Mapping[fx.Node, Kind]) -> Kind | None:
    argument = node.args[index] if len(node.args) > index else None
    if isinstance(argument, (int, float)):
        return Constant()
    return kinds.get(argument) if isinstance(argument, fx.Node) else None


def _is_row(argument: object) -> bool:
    """A number, or a tensor that is the same for every token: [], [d], or with leading axes of size 1."""
    if not isinstance(argument, fx.Node):
        return isinstance(argument, (int, float))
    return all(size == 1 for size in argument.meta["val"].shape[:-1])


def _sum(node: fx.Node, kinds: Mapping[fx.Node, Kind]) -> Affine | None:
    left, right = _kind(node, 0, kinds), _kind(node, 1, kinds)
    flip = is_call(node, aten.sub.Tensor)
    if isinstance(left, Affine) and isinstance(right, Affine):
        shared = left.streams & right.streams
        unit = (left.unit | (frozenset() if flip else right.unit)) - shared
        same = node.args[0].meta["val"].shape[-1] == node.args[1].meta["val"].shape[-1]  # type: ignore[union-attr]
        return Affine(left.streams | right.streams, unit, left.offset or right.offset) if same else None
    if isinstance(left, Affine) and isinstance(right, Constant) and _is_row(node.args[1]):
        return Affine(left.streams, left.unit, True)
    if isinstance(right, Affine) and isinstance(left, Constant) and _is_row(node.args[0]):
        return Affine(right.streams, frozenset() if flip else right.unit, True)
    return None


def _scale(node: fx.Node, kinds: Mapping[fx.Node, Kind]) -> Affine | None:
    left, right = _kind(node, 0, kinds), _kind(node, 1, kinds)
    if isinstance(left, Affine) and isinstance(right, Constant) and _is_row(node.args[1]):
        unit = left.unit if node.args[1] == 1 else frozenset()
        return Affine(left.streams, unit, left.offset)
    if is_call(node, aten.div.Tensor):
        return None
    if isinstance(right, Affine) and isinstance(left, Constant) and _is_row(node.args[0]):
        return Affine(right.streams, frozenset(), right.offset)
    return None
