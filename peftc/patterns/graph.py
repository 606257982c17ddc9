"""A graph as a matcher sees it: nodes by op, the operands of a node, and what may be stepped over.

Between two ops of a pattern, casts, dropout and copies are stepped over always; views where they keep the last axis,
and any view or transpose beside an op that works on other axes (an attention, a product of matrices, a parameter's
transpose).
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import fx

from peftc.ir.program import Program, shape_of
from peftc.patterns.ops import PatternOp
from peftc.patterns.terms import Call, Inner, Piece

aten = torch.ops.aten

MAX_STEPS_OVER = 32
"""Ops stepped over between two ops of a pattern."""

_SAME = frozenset((
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.dropout.default,
))  # fmt: skip
_VIEWS = frozenset((
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.flatten.using_ints, aten.unflatten.int, aten.expand.default,
))  # fmt: skip
_AXES = frozenset((aten.transpose.int, aten.permute.default, aten.t.default))
_SPLITS = frozenset((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default))

Targets = dict[Any, tuple[int, ...]]


@lru_cache(maxsize=1024)
def targets_of(op: PatternOp) -> Targets:
    """The overloads of an op with the positions of its operands."""
    found: Targets = {}
    for name, slots in op.targets.items():
        packet, _, overload = name.partition(".")
        found[getattr(getattr(aten, packet), overload)] = slots
    return found


@lru_cache(maxsize=4096)
def _slots(call: Call) -> Targets:
    """The overloads a term may be, with the positions of its operands."""
    found: Targets = {}
    for op in call.ops:
        for target, slots in targets_of(op).items():
            found.setdefault(target, slots)
    return found


def argument(node: fx.Node, position: int) -> Any:
    """An argument by its position in the op's signature, however the call gives it; None where it gives none."""
    if position < len(node.args):
        return node.args[position]
    if not node.kwargs:
        return None
    return node.kwargs.get(_argument_names(node.target)[position])


@lru_cache(maxsize=1024)
def _argument_names(target: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in target._schema.arguments)


def _on_last_axis(node: fx.Node) -> bool:
    dims = argument(node, 1)
    last = argument(node, 0).meta["val"].dim() - 1
    return dims in (-1, last) or (isinstance(dims, (list, tuple)) and list(dims) in ([-1], [last]))


_GUARDS: dict[str, Callable[[fx.Node], object]] = {
    "gelu": lambda node: argument(node, 1) is None and node.kwargs.get("approximate", "none") == "none",
    "gelu_tanh": lambda node: node.kwargs.get("approximate", "none") == "tanh",
    "add": lambda node: node.kwargs.get("alpha", 1) == 1,
    "sub": lambda node: node.kwargs.get("alpha", 1) == 1,
    "softmax": _on_last_axis,
    "mean": _on_last_axis,
    "sum": _on_last_axis,
    "amax": _on_last_axis,
}
"""What else an op asks of a node that calls one of its overloads."""


def is_op(call: Call, node: fx.Node) -> bool:
    """Whether a node calls an op of the term."""
    if node.target not in _slots(call):
        return False
    return any(node.target in targets_of(op) and (op.name not in _GUARDS or _GUARDS[op.name](node)) for op in call.ops)


Operands = tuple[Any, ...]


def orders(call: Call, node: fx.Node) -> tuple[Operands, ...]:
    """The operands of a node as the term's, in each order that means the same; () where their number differs.

    An operand that the term does not write is absent, or of no matter where the op is `open`.
    """
    op = call.ops[0]
    found = [argument(node, slot) for slot in _slots(call)[node.target]]
    if op.variadic:
        found = list(found[0]) if isinstance(found[0], (list, tuple)) else found
        return (tuple(found),) if len(found) == len(call.operands) else ()
    rest = found[len(call.operands) :]
    if not op.open and any(part is not None for part in rest):
        return ()
    own = (*found[: len(call.operands)], *(None for _ in range(len(call.operands) - len(found))))
    return (own, (own[1], own[0])) if op.commutative and len(own) == 2 else (own,)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the last axis of `source`, from `start` to before `stop` out of `width`."""

    source: fx.Node
    start: int
    stop: int
    width: int


def part_of(node: fx.Node) -> Part | None:
    """A node read as a part of the last axis of another: an item of a split or chunk, or a slice."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _item(node)
    if node.target is aten.slice.Tensor:
        source, dim, start, stop = (argument(node, i) for i in range(4))
        width = shape_of(source)[-1]
        if (
            dim not in (-1, source.meta["val"].dim() - 1)
            or not isinstance(width, int)
            or argument(node, 4) not in (None, 1)
        ):
            return None
        if not isinstance(start, (int, type(None))) or not isinstance(stop, (int, type(None))):
            return None
        low, high, _ = slice(start, stop).indices(width)
        return Part(source, low, high, width) if high - low < width else None
    return None


def _item(node: fx.Node) -> Part | None:
    parent, index = node.args
    if not isinstance(parent, fx.Node) or parent.target not in _SPLITS or not isinstance(index, int):
        return None
    source, values = argument(parent, 0), parent.meta["val"]
    if (argument(parent, 2) or 0) not in (-1, source.meta["val"].dim() - 1):
        return None
    widths = [value.shape[-1] for value in values]
    if not all(isinstance(width, int) for width in widths):
        return None
    return Part(source, sum(widths[:index]), sum(widths[: index + 1]), sum(widths))


def _last(node: fx.Node) -> Any:
    shape = shape_of(node)
    return shape[-1] if shape else None


def _keeps_last(node: fx.Node, source: fx.Node) -> bool:
    """Whether a view or transpose leaves the last axis as it is."""
    if node.target in _AXES:
        rank = source.meta["val"].dim()
        if node.target is aten.transpose.int:
            return all(dim % rank != rank - 1 for dim in (argument(node, 1), argument(node, 2)))
        return node.target is aten.permute.default and argument(node, 1)[-1] % rank == rank - 1
    if node.target is aten.unsqueeze.default:
        return argument(node, 1) not in (-1, node.meta["val"].dim() - 1)
    before, after = _last(source), _last(node)
    return before is after or (isinstance(before, int) and before == after)


def step_over(node: fx.Node, *, any_axis: bool) -> fx.Node | None:
    """The value that a transparent node passes on; None for a node that is not transparent here."""
    target = node.target
    if node.op != "call_function" or not (target in _SAME or target in _VIEWS or target in _AXES or _is_whole(node)):
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if any_axis or target in _SAME or target is aten.slice.Tensor or _keeps_last(node, source):
        return source
    return None


def _is_whole(node: fx.Node) -> bool:
    """A slice that takes everything."""
    if node.target is not aten.slice.Tensor:
        return False
    start, stop = argument(node, 2), argument(node, 3)
    return start in (None, 0) and (stop is None or (isinstance(stop, int) and stop == 2**63 - 1))


def plain_value(node: fx.Node) -> fx.Node:
    """The value behind casts, copies and dropout: two nodes with the same one are one value to a pattern."""
    while node.op == "call_function" and node.target in _SAME and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


@dataclass
class GraphIndex:
    """The nodes of a program by op; made once for all patterns."""

    program: Program

    @cached_property
    def by_target(self) -> dict[Any, list[fx.Node]]:
        found: dict[Any, list[fx.Node]] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                found.setdefault(node.target, []).append(node)
        return found

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        return {node: index for index, node in enumerate(self.program.graph.nodes)}

    def count(self, term: Inner) -> int:
        """How many nodes may be the term, by their op alone."""
        return sum(len(self.by_target.get(target, ())) for target in targets(term))

    def nodes(self, term: Inner) -> list[fx.Node]:
        """The nodes that may be the term, by their op alone."""
        return [node for target in targets(term) for node in self.by_target.get(target, ())]

    def readers(self, nodes: Iterable[fx.Node], term: Inner, most: int | None = None) -> set[fx.Node]:
        """The nodes that may be the term and read one of `nodes`, directly or past what is stepped over.

        With `most`, of that many readers looked at, the nearest first.
        """
        wanted, found = targets(term), set[fx.Node]()
        queue, seen = deque((node, 0) for node in nodes), set[fx.Node]()
        while queue:
            node, distance = queue.popleft()
            for user in node.users:
                if user in seen:
                    continue
                if most is not None and len(seen) >= most:
                    return found
                seen.add(user)
                if user.target in wanted:
                    found.add(user)
                passes = step_over(user, any_axis=True) is node or user.target in _SPLITS
                if passes and distance < MAX_STEPS_OVER:
                    queue.append((user, distance + 1))
        return found


@lru_cache(maxsize=4096)
def targets(term: Inner) -> frozenset[Any]:
    """The overloads of a term."""
    if isinstance(term, Piece):
        return frozenset((operator.getitem, aten.slice.Tensor))
    return frozenset(_slots(term))
