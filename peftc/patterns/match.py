"""The matcher: finds a pattern in a graph, and where it does not match, how far it came.

Matching is rooted. Of the ops of a pattern, the one that the graph holds fewest of is the anchor; from its nodes a walk
forward, along the pattern, gives the roots, and each root is matched backward by itself. What feeds a root is judged
once for each pair of term and node, so that sums and products are tried in both orders without a search of all
combinations, and what is left to decide is bounded: the whole is linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from peftc.patterns.graph import GraphIndex, Operands, part_of, plain_value, targets_of
from peftc.patterns.judge import NEAR, Judge, Parameter, Reader, is_number
from peftc.patterns.ops import PATTERN_OPS
from peftc.patterns.terms import (
    Call,
    Inner,
    Leaf,
    Nearest,
    Number,
    Piece,
    Place,
    Term,
    Variant,
    operands_of,
    path_to,
    paths_below,
)

MAX_STEPS = 2000
"""Comparisons for one root, after which it counts as no match."""

MOST_READERS = 256
"""Readers of a shared value that are looked at for a further output: a value that every layer reads leads nowhere."""

Bound = fx.Node | Parameter | float | None


@dataclass(slots=True)
class Match:
    """What a variant's terms and names are at one root."""

    variant: Variant
    nodes: dict[Inner, fx.Node]
    leaves: dict[str, Bound]

    def value(self, name: str) -> Bound:
        """The node (or parameter, or number) of a name; None where it is absent."""
        term = self.variant.values.get(name)
        if isinstance(term, Nearest):
            term = term.call
        if isinstance(term, (Call, Piece)):
            return self.nodes.get(term)
        return self.leaves.get(term.name if isinstance(term, Leaf) else name)

    def outputs(self) -> list[fx.Node]:
        return [self.nodes[term] for term in self.variant.roots if isinstance(term, (Call, Piece))]


@dataclass(frozen=True, slots=True)
class Miss:
    """How far a match came: `score` counts what fitted, `node` did not fit at `place`, as `reason` says."""

    score: float
    place: Place
    node: fx.Node | None
    reason: str


Goal = tuple[Term, Any, Reader, fx.Node | None]
"""A term, the operand it is compared with, the term that reads it, and the node that reads it."""

Goals = tuple[Goal, "Goals"] | None


@dataclass(slots=True)
class Matcher:
    """One variant against one graph; `explain` keeps the furthest miss and judges nothing ahead."""

    index: GraphIndex
    variant: Variant
    judge: Judge
    explain: bool = False
    miss: Miss | None = None
    nodes: dict[Inner, fx.Node] = field(default_factory=dict)
    leaves: dict[str, Bound] = field(default_factory=dict)
    claimed: dict[fx.Node, Inner] = field(default_factory=dict)
    trail: list[tuple[dict[Any, Any], Any]] = field(default_factory=list)
    steps: int = 0

    def roots(self) -> list[fx.Node]:
        """The nodes that may be the last output, in graph order."""
        root = self._first()
        if self.explain:
            found: Iterable[fx.Node] = self.index.nodes(root)
        else:
            anchor = min(self.variant.inner, key=self.index.count)
            if self.index.count(anchor) == 0:
                return []
            path = path_to(root, anchor)
            found = self.index.nodes(root) if path is None else self._climb(self.index.nodes(anchor), path)
        return sorted(found, key=self.index.order.__getitem__)

    def _climb(self, nodes: Iterable[fx.Node], path: list[Inner], most: int | None = None) -> set[fx.Node]:
        """The nodes that may be the end of a path of terms, each reading the one before, from `nodes`."""
        level = set(nodes)
        for term in path:
            level = self.index.readers(level, term, most)
        return level

    def at(self, node: fx.Node) -> Match | None:
        """The match whose last output is `node`."""
        self.nodes, self.leaves, self.claimed, self.trail, self.steps, self.miss = {}, {}, {}, [], 0, None
        first, *others = self.variant.roots
        if not self.explain and not self.judge.may_be(first, node):
            return None
        if not self._solve(((first, node, None, None), None)):
            return None
        if not all(self._other(root) for root in others):
            return None
        return Match(self.variant, dict(self.nodes), dict(self.leaves))

    def _other(self, root: Term) -> bool:
        """A further output: reached forward from a value that is bound."""
        assert isinstance(root, (Call, Piece))
        if root in self.nodes:
            return True
        for start, path in sorted(self._ways_to(root), key=lambda way: len(way[0].users)):
            for node in sorted(self._climb([start], path, MOST_READERS), key=self.index.order.__getitem__):
                if self._attempt(((root, node, None, None), None)):
                    return True
        title = root.title
        return self._fail(root, None, self.nodes.get(self._first()), f"no `{title}` that shares a value with the rest")

    def _first(self) -> Inner:
        root = self.variant.roots[0]
        assert isinstance(root, (Call, Piece))
        return root

    def _ways_to(self, root: Inner) -> Iterable[tuple[fx.Node, list[Inner]]]:
        for term, path in paths_below(root):
            if isinstance(term, (Call, Piece)) and term in self.nodes:
                yield self.nodes[term], path
            elif isinstance(term, Leaf):
                bound = self.leaves.get(term.name)
                node = bound.node if isinstance(bound, Parameter) else bound
                if isinstance(node, fx.Node):
                    yield plain_value(node), path

    # Matching: one choice after the other, taken back where it leads nowhere.

    def _attempt(self, goals: Goals) -> bool:
        mark = len(self.trail)
        if self._solve(goals):
            return True
        while len(self.trail) > mark:
            table, key = self.trail.pop()
            del table[key]
        return False

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        table[key] = value
        self.trail.append((table, key))

    def _solve(self, goals: Goals) -> bool:
        while goals is not None:
            (term, operand, reader, at), goals = goals
            self.steps += 1
            if self.steps > MAX_STEPS:
                return self._fail(term, None, at, f"more than {MAX_STEPS} comparisons for one root")
            if isinstance(term, (Leaf, Number)):
                if not (self._leaf(term, operand, at) if isinstance(term, Leaf) else self._number(term, operand, at)):
                    return False
                continue
            inner = term.call if isinstance(term, Nearest) else term
            node, ended = self._located(term, operand, reader)
            if node is None:
                return self._fail_at(term, ended, at)
            if inner in self.nodes or node in self.claimed:
                if self.nodes.get(inner) is node:
                    continue
                return self._fail(term, node, at, self._why_other(inner, node))
            self._set(self.nodes, inner, node)
            self._set(self.claimed, node, inner)
            readings = self.judge.readings(inner, node)
            if not readings:
                return self._fail(inner, node, at, _why_operands(inner, node))
            if not self.explain and len(readings) > 1:
                readings = [r for r in readings if all(self.judge.may_be(p, v, inner) for p, v in zip(*r, strict=True))]
            if len(readings) != 1:
                return any(self._attempt(_with(reading, inner, node, goals)) for reading in readings)
            goals = _with(readings[0], inner, node, goals)
        return True

    def _located(self, term: Inner | Nearest, operand: Any, reader: Reader) -> tuple[Any, Any]:
        if isinstance(term, Nearest):
            return self.judge.nearest(term, operand), operand
        return self.judge.behind(term, operand, reader)

    def _leaf(self, term: Leaf, operand: Any, at: fx.Node | None) -> bool:
        if operand is None and not term.optional:
            return self._fail(term, None, at, f"nothing where the pattern has `{term.name}`")
        if term.name == "_":
            return True
        bound: Bound = operand
        if term.parameter and operand is not None:
            bound = self.judge.parameter(operand, at) if isinstance(operand, fx.Node) else None
            if bound is None:
                return self._fail(term, operand, at, f"{described(operand)} where the pattern has a parameter")
        if term.name in self.leaves:
            if _same(self.leaves[term.name], bound):
                return True
            first = described(self.leaves[term.name])
            return self._fail(term, operand, at, f"{described(operand)} where `{term.name}` is {first} already")
        self._set(self.leaves, term.name, bound)
        return True

    def _number(self, term: Number, operand: Any, at: fx.Node | None) -> bool:
        if is_number(operand) and operand == term.value:
            return True
        return self._fail(term, operand, at, f"{described(operand)} where the pattern has {term.value}")

    # The furthest miss.

    def _fail_at(self, term: Inner | Nearest, ended: Any, at: fx.Node | None) -> bool:
        if isinstance(term, Nearest):
            where = f"within {NEAR} nodes of {described(at)}"
            return self._fail(term, at, at, f"no {term.call.title} {where}")
        reason = f"{described(ended)} where the pattern has `{term.title}`"
        return self._fail(term, ended, at, reason, likeness=self._likeness(term, ended))

    def _likeness(self, term: Inner, node: Any) -> float:
        """More for a node of a kind with the term (both activations, say) than for one of a kind with another term."""
        if not isinstance(node, fx.Node):
            return 0.0
        groups = {op.group for op in PATTERN_OPS.values() if op.group and node.target in targets_of(op)}
        if groups & _groups(term):
            return 0.5
        return 0.25 if any(groups & _groups(other) for other in self.variant.inner) else 0.0

    def _why_other(self, inner: Inner, node: fx.Node) -> str:
        if inner in self.nodes:
            return f"{node.name} where the pattern has the {inner.title} that is {self.nodes[inner].name}"
        return f"{node.name} twice where the pattern has two values"

    def _fail(self, term: Term, node: Any, at: fx.Node | None, reason: str, *, likeness: float = 0.0) -> bool:
        """Keep the furthest miss. `node` did not fit, `at` reads it and says where that is when it is no op."""
        if self.explain:
            score = len(self.nodes) + len(self.leaves) / 128 + likeness
            if self.miss is None or score > self.miss.score:
                shown = node if isinstance(node, fx.Node) and node.op == "call_function" else at
                self.miss = Miss(score, term.place, shown, reason)
        return False


def _with(reading: tuple[tuple[Term, ...], Operands], term: Inner, node: fx.Node, goals: Goals) -> Goals:
    parts, values = reading
    for part, value in reversed(list(zip(parts, values, strict=True))):
        goals = ((part, value, term, node), goals)
    return goals


def _same(one: Bound, other: Bound) -> bool:
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return plain_value(one) is plain_value(other)
    if isinstance(one, Parameter) and isinstance(other, Parameter):
        return one.node is other.node
    return type(one) is type(other) and one == other


def _groups(term: Inner) -> set[str]:
    return {op.group for op in term.ops} - {""} if isinstance(term, Call) else set()


def _why_operands(term: Inner, node: fx.Node) -> str:
    count = len(operands_of(term))
    if isinstance(term, Call) and term.ops[0].name in ("linear", "conv"):
        return f"a bias where the pattern has `{term.place.text}`"
    return f"another number of operands than the {count} of the pattern"


def described(value: Any) -> str:
    """A node, parameter or number in a few words: its op, or its name."""
    if isinstance(value, Parameter):
        return value.node.name
    if not isinstance(value, fx.Node):
        return "nothing" if value is None else str(value)
    if value.op == "placeholder":
        return value.name
    part = part_of(value)
    if part is not None:
        return f"a part of {described(part.source)}"
    packet = getattr(value.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(value.target, "__name__", str(value.target))
