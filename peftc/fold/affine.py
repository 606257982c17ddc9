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
from dataclasses import dataclass, replace

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
    foreign: fx.Node | None = None
    """The value that the culprit reads, where that is neither a stream nor a function of parameters."""

    @property
    def reason(self) -> str:
        if self.foreign is not None:
            return f"it reads {self.foreign}, another activation than the folded weight's own input"
        packet = getattr(self.culprit.target, "overloadpacket", None)
        name = str(packet.__name__ if packet is not None else self.culprit.target)
        how = "an affine function of each token by itself" if name in _ACROSS else "affine in its input"
        return f"`{name}` is not {how}"


Kind = Constant | Affine | Opaque
Kinds = Mapping[fx.Node, Kind]

_ACROSS = frozenset({
    "bmm", "cat", "cumsum", "einsum", "expand", "flatten", "flip", "index_select", "matmul", "mean", "permute",
    "reshape", "roll", "select", "slice", "squeeze", "stack", "sum", "transpose", "unflatten", "unsqueeze",
})  # fmt: skip
"""Ops that may well be affine, but mix tokens or give a token more than one vector."""

_SAME = (
    aten.to.dtype, aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.alias.default,
    aten._to_copy.default, aten.detach.default,
)  # fmt: skip
"""The identity, in evaluation."""


def classify(
    nodes: Iterable[fx.Node], streams: Mapping[fx.Node, str], parameters: Iterable[fx.Node]
) -> dict[fx.Node, Kind]:
    """The kind of every node of a subgraph, given the nodes that are its streams and those that are parameters."""
    kinds: dict[fx.Node, Kind] = dict.fromkeys(parameters, Constant())
    for node, name in streams.items():
        kinds[node] = Affine(frozenset({name}), frozenset({name}))
    for node in nodes:
        if node not in kinds:
            kinds[node] = _transfer(node, kinds)
    return kinds


def _transfer(node: fx.Node, kinds: Kinds) -> Kind:
    foreign = next((operand for operand in node.all_input_nodes if operand not in kinds), None)
    if foreign is not None:
        return Opaque(node, frozenset(), foreign)
    operands = [kinds[operand] for operand in node.all_input_nodes]
    read = frozenset[str]().union(*(kind.streams for kind in operands if not isinstance(kind, Constant)))
    blocked = next((kind for kind in operands if isinstance(kind, Opaque)), None)
    if blocked is not None:
        return replace(blocked, streams=read)
    if all(isinstance(kind, Constant) for kind in operands):
        return Constant()
    return _affine(node, kinds) or Opaque(node, read)


def _affine(node: fx.Node, kinds: Kinds) -> Affine | None:
    """The rule of each op that keeps a function affine; at least one operand is `Affine`, the others constants."""
    data = _kind(node.args[0], kinds)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _sum(node, kinds)
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return _scale(node, kinds)
    if is_call(node, aten.einsum.default):
        return _einsum(node, kinds)
    if is_call(node, aten.cat.default):
        return _concat(node, kinds)
    if not isinstance(data, Affine):
        return None
    if is_call(node, *_SAME):
        return data
    if is_call(node, aten.neg.default) or _on_last_axis(node):
        return Affine(data.streams, offset=data.offset)
    if is_call(node, aten.linear.default):
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        constant = _is_matrix(weight, kinds) and (bias is None or isinstance(_kind(bias, kinds), Constant))
        return Affine(data.streams, offset=data.offset or bias is not None) if constant else None
    if is_call(node, aten.matmul.default) and _is_matrix(node.args[1], kinds):
        return Affine(data.streams, offset=data.offset)
    return None


def _kind(argument: object, kinds: Kinds) -> Kind | None:
    if isinstance(argument, (int, float)):
        return Constant()
    return kinds.get(argument) if isinstance(argument, fx.Node) else None


def _is_matrix(argument: object, kinds: Kinds) -> bool:
    return isinstance(argument, fx.Node) and _is_constant(argument, kinds) and argument.meta["val"].dim() == 2


def _is_constant(argument: object, kinds: Kinds) -> bool:
    return isinstance(_kind(argument, kinds), Constant)


def _is_row(argument: object) -> bool:
    """A number, or a tensor that is the same for every token: [], [d], or with leading axes of size 1."""
    if not isinstance(argument, fx.Node):
        return isinstance(argument, (int, float))
    return all(size == 1 for size in argument.meta["val"].shape[:-1])


def _width(argument: object) -> object:
    if not isinstance(argument, fx.Node) or argument.meta["val"].dim() == 0:
        return 1
    return argument.meta["val"].shape[-1]


def _sum(node: fx.Node, kinds: Kinds) -> Affine | None:
    left, right = _kind(node.args[0], kinds), _kind(node.args[1], kinds)
    for kind, argument in ((left, node.args[0]), (right, node.args[1])):
        if not isinstance(kind, Affine) and not _is_row(argument):
            return None
    streams, unit, offset = frozenset[str](), frozenset[str](), False
    for index, kind in enumerate((left, right)):
        if not isinstance(kind, Affine):
            offset = True
            continue
        negative = index == 1 and is_call(node, aten.sub.Tensor)
        plain = not negative and not node.kwargs and _width(node.args[index]) == _width(node)
        unit = (unit | (kind.unit if plain else frozenset())) - (streams & kind.streams)
        streams, offset = streams | kind.streams, offset or kind.offset
    return Affine(streams, unit, offset)


def _scale(node: fx.Node, kinds: Kinds) -> Affine | None:
    left, right = _kind(node.args[0], kinds), _kind(node.args[1], kinds)
    if isinstance(left, Affine) and isinstance(right, Constant) and _is_row(node.args[1]):
        one = isinstance(node.args[1], (int, float)) and node.args[1] == 1
        return Affine(left.streams, left.unit if one else frozenset(), left.offset)
    if isinstance(right, Affine) and isinstance(left, Constant) and _is_row(node.args[0]):
        return Affine(right.streams, offset=right.offset) if is_call(node, aten.mul.Tensor) else None
    return None


def _on_last_axis(node: fx.Node) -> bool:
    """A slice of the last axis, entries of it in another order, or its sum or mean, kept."""
    if is_call(node, aten.index_select.default):
        return node.args[1] in (-1, _rank(node.args[0]) - 1)
    if is_call(node, aten.slice.Tensor):
        source, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        return axis in (-1, _rank(source) - 1)
    if is_call(node, aten.mean.dim, aten.sum.dim_IntList):
        return node.args[1] in ([-1], [_rank(node.args[0]) - 1]) and len(node.args) > 2 and node.args[2] is True
    return False


def _rank(argument: object) -> int:
    return argument.meta["val"].dim() if isinstance(argument, fx.Node) else 0


def _concat(node: fx.Node, kinds: Kinds) -> Affine | None:
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    found = [_kind(part, kinds) for part in parts] if isinstance(parts, (list, tuple)) else []
    affine = [kind for kind in found if isinstance(kind, Affine)]
    if len(affine) != len(found) or axis not in (-1, _rank(node) - 1):
        return None
    streams = frozenset[str]().union(*(kind.streams for kind in affine))
    return Affine(streams, offset=any(kind.offset for kind in affine))


def _einsum(node: fx.Node, kinds: Kinds) -> Affine | None:
    """One affine operand whose leading axes come out as they went in and are met by no other operand."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return None
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    affine = [i for i, operand in enumerate(operands) if isinstance(_kind(operand, kinds), Affine)]
    if len(affine) != 1 or "." in equation or len(terms) != len(operands):
        return None
    data = _kind(operands[affine[0]], kinds)
    tokens = terms[affine[0]][:-1]
    others = "".join(term for i, term in enumerate(terms) if i != affine[0])
    apart = result[:-1] == tokens and len(set(terms[affine[0]])) == len(terms[affine[0]])
    if not isinstance(data, Affine) or not apart or set(tokens) & set(others + result[-1:]):
        return None
    return Affine(data.streams, offset=data.offset)
