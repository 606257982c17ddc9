"""Judging: whether a term of a pattern can be a node of the graph, names apart.

Each pair of term and node is judged once, so that what feeds many roots costs no more than the graph is large, and a
sum of sums is not tried in every order of its parts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from peftc.ir.program import Program, shape_of
from peftc.patterns.graph import MAX_STEPS_OVER, Operands, Part, is_op, orders, part_of, step_over, targets
from peftc.patterns.terms import Call, Inner, Leaf, Nearest, Number, Piece, Term

NEAR = 64
"""Nodes that `nearest` looks at."""

Reader = Inner | Nearest | None
"""The term that reads another."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that a name stands for, the node that reads its placeholder, and whether it is read transposed."""

    node: fx.Node
    reader: fx.Node
    transposed: bool


@dataclass(slots=True)
class Judge:
    """The judgements about one variant on one program."""

    program: Program
    judged: dict[tuple[Inner, fx.Node], bool] = field(default_factory=dict)

    def may_be(self, term: Term, operand: Any, reader: Reader = None) -> bool:
        if isinstance(term, Leaf):
            return self._leaf_fits(term, operand)
        if isinstance(term, Number):
            return is_number(operand) and operand == term.value
        node = self._found(term, operand, reader)
        if node is None:
            return False
        inner = term.call if isinstance(term, Nearest) else term
        key = (inner, node)
        if key not in self.judged:
            self.judged[key] = any(
                all(self.may_be(part, value, inner) for part, value in zip(parts, order, strict=True))
                for parts, order in self.readings(inner, node)
            )
        return self.judged[key]

    def _leaf_fits(self, term: Leaf, operand: Any) -> bool:
        if operand is None:
            return term.optional
        if term.parameter:
            return isinstance(operand, fx.Node) and self.parameter(operand) is not None
        return term.name == "_" or is_number(operand) or isinstance(operand, fx.Node)

    def _found(self, term: Inner | Nearest, operand: Any, reader: Reader) -> fx.Node | None:
        """The node of a term at or behind an operand."""
        if isinstance(term, Nearest):
            return self.nearest(term, operand)
        return self.behind(term, operand, reader)[0]

    def behind(self, term: Inner, operand: Any, reader: Reader) -> tuple[fx.Node | None, Any]:
        """The node of a term behind what may be stepped over, and the node at which the walk ended."""
        any_axis = _any_axis(term) or _any_axis(reader)
        for _ in range(MAX_STEPS_OVER):
            if not isinstance(operand, fx.Node):
                return None, operand
            if self._is(term, operand):
                return operand, operand
            behind = step_over(operand, any_axis=any_axis)
            if behind is None:
                return None, operand
            operand = behind
        return None, operand

    def _is(self, term: Inner, node: fx.Node) -> bool:
        if isinstance(term, Call):
            return is_op(term, node)
        return node.target in targets(term) and self._part(term, node) is not None

    def _part(self, term: Piece, node: fx.Node) -> Part | None:
        """The node as the part of that index: the first one starts at 0, the last one goes to the end."""
        part = part_of(node)
        if part is None or (part.start == 0) != (term.index == 0):
            return None
        return part if (part.stop == part.width) == (term.index == term.count - 1) else None

    def nearest(self, term: Nearest, operand: Any) -> fx.Node | None:
        queue, seen = deque([operand]), set[fx.Node]()
        while queue and len(seen) < NEAR:
            node = queue.popleft()
            if not isinstance(node, fx.Node) or node in seen:
                continue
            if is_op(term.call, node):
                return node
            seen.add(node)
            queue.extend(node.all_input_nodes)
        return None

    def readings(self, term: Inner, node: fx.Node) -> list[tuple[tuple[Term, ...], Operands]]:
        if isinstance(term, Piece):
            part = self._part(term, node)
            return [] if part is None else [(term.operands, (part.source,))]
        return [(term.operands, order) for order in orders(term, node)]

    def parameter(self, node: fx.Node, reader: fx.Node | None = None) -> Parameter | None:
        """The parameter that an operand is, past casts, views and transposes."""
        transposed, steps = False, 0
        while node.op != "placeholder" and steps < MAX_STEPS_OVER:
            behind = step_over(node, any_axis=True)
            if behind is None:
                return None
            axes = len(shape_of(node)) == 2 and node.target.overloadpacket.__name__ in ("t", "transpose", "permute")  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
            node, reader, transposed, steps = behind, node, transposed != axes, steps + 1
        if self.program.parameter_name(node) is None:
            return None
        return Parameter(node, node if reader is None else reader, transposed)


def _any_axis(term: Inner | Nearest | None) -> bool:
    return isinstance(term, Call) and any(op.heads for op in term.ops)


def is_number(operand: Any) -> bool:
    return isinstance(operand, (int, float)) and not isinstance(operand, bool)
