"""The lines of `match:` as text: where the `=` stands, which names are optional, and every `any` decided.

A line is `name = expression` or `a, b = split(h)`. Its expression is Python's, parsed by `peftc.lang.grammar.tree_of`
and never evaluated, with one addition: `b?` is a name whose value may be absent.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from peftc.diagnostics import Collector, PeftcError, Span
from peftc.lang.complaints import shown
from peftc.lang.grammar import tree_of
from peftc.lang.rule import Expr
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode
from peftc.patterns.terms import Place

MAX_VARIANTS = 32

_LEFT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*(?:\s*,\s*[A-Za-z_][A-Za-z0-9_]*)*)\s*=(?!=)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTIONAL = re.compile(r"(?<=[A-Za-z0-9_])\?")


@dataclass(frozen=True, slots=True)
class Line:
    """One line: the names it gives, its expression, and the columns at which optional names end."""

    names: tuple[Place, ...]
    expr: Expr
    optional: frozenset[int]
    text: str

    def place(self, node: ast.AST) -> Place:
        """The place of a part of the expression; a call is told at its op, a sum or product at its operator."""
        text = ast.get_source_segment(self.expr.text, node) or ""
        return Place(text, self.text, self.expr.span_of(self._head(node)))

    def _head(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Call):
            return node.func
        if not isinstance(node, ast.BinOp):
            return node
        start, end = node.left.end_col_offset or 0, node.right.col_offset
        symbol = self.expr.text[start:end].strip("() ")
        start += self.expr.text[start:end].index(symbol)
        return ast.Name("_", lineno=1, end_lineno=1, col_offset=start, end_col_offset=start + len(symbol))


Block = Line | list[list["Block"]]
"""A line, or alternatives that are blocks each."""


def read_blocks(node: Node | None, collector: Collector) -> list[Block]:
    """The lines under `match:`, those that can be read."""
    items = node.items if isinstance(node, SequenceNode) else (node,)
    found: list[Block] = []
    for item in items:
        if isinstance(item, ScalarNode):
            line = _line(item, collector)
            found += [] if line is None else [line]
        elif isinstance(item, MappingNode) and isinstance(choice := item.get("any"), SequenceNode):
            found.append([read_blocks(alternative, collector) for alternative in choice.items])
    return found


def _line(node: ScalarNode, collector: Collector) -> Line | None:
    text, span = node.text.replace("\n", " "), node.inner
    left = _LEFT.match(text)
    if left is None:
        help = "as in `out = linear(x, W)`"
        collector.error("E011", f"`{shown(text)}` names no value", span=span, help=help)
        return None
    names = tuple(
        Place(match[0], text.strip(), _part(span, match.start(), match.end(), node.exact))
        for match in _NAME.finditer(text, 0, left.end())
    )
    source = text[left.end() :]
    lead = left.end() + len(source) - len(source.lstrip())
    source = source.strip()
    inner = _part(span, lead, lead + max(1, len(source)), node.exact)
    optional = frozenset(match.start() for match in _OPTIONAL.finditer(source))
    source = "".join(" " if index in optional else char for index, char in enumerate(source)).rstrip()
    try:
        tree = tree_of(source, inner, node.exact)
    except PeftcError as error:
        collector.extend(error.diagnostics)
        return None
    return Line(names, Expr(source, tree, inner, node.exact), optional, text.strip())


def _part(span: Span, start: int, end: int, exact: bool) -> Span:
    return Span(span.file, span.line, span.col + start, span.col + end, span.text) if exact else span


def every_line(blocks: list[Block]) -> Iterator[Line]:
    """Each line once, whatever alternative it is in."""
    for block in blocks:
        if isinstance(block, Line):
            yield block
        else:
            for alternative in block:
                yield from every_line(alternative)


def is_choice(node: ast.AST) -> bool:
    """Whether a call chooses among expressions: any(silu(g), g)."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "any"


def variants(blocks: list[Block], collector: Collector) -> list[list[Line]]:
    """The lines with every choice made, in each way there is; E017 when there are more than 32."""
    count = _count(blocks)
    if count > MAX_VARIANTS:
        span = next((line.names[0].span for line in every_line(blocks)), None)
        message = f"{count} ways to choose among the alternatives of `any`; the limit is {MAX_VARIANTS}"
        collector.error("E017", message, span=span, help="any(silu, gelu)(g) chooses an op and counts as one way")
        return []
    return _expanded(blocks)


def _count(blocks: list[Block]) -> int:
    return prod(_ways(b.expr.tree) if isinstance(b, Line) else sum(_count(a) for a in b) for b in blocks)


def _expanded(blocks: list[Block]) -> list[list[Line]]:
    choices: list[list[list[Line]]] = []
    for block in blocks:
        if isinstance(block, Line):
            trees = _trees(block.expr.tree)
            choices.append([[replace(block, expr=replace(block.expr, tree=tree))] for tree in trees])
        else:
            choices.append([lines for alternative in block for lines in _expanded(alternative)])
    return [[line for lines in chosen for line in lines] for chosen in product(*choices)]


def _ways(node: ast.expr) -> int:
    if is_choice(node):
        return sum(_ways(argument) for argument in _arguments(node))
    return prod(_ways(child) for child in _arguments(node))


def _trees(node: ast.expr) -> list[ast.expr]:
    if is_choice(node):
        return [tree for argument in _arguments(node) for tree in _trees(argument)]
    inner = [_trees(child) for child in _arguments(node)]
    return [node] if all(len(trees) == 1 for trees in inner) else [_with(node, parts) for parts in product(*inner)]


def _arguments(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.Call):
        return node.args
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    return [node.operand] if isinstance(node, ast.UnaryOp) else []


def _with(node: ast.expr, parts: tuple[ast.expr, ...]) -> ast.expr:
    if isinstance(node, ast.Call):
        made: ast.expr = ast.Call(node.func, list(parts), [])
    elif isinstance(node, ast.BinOp):
        made = ast.BinOp(parts[0], node.op, parts[1])
    else:
        assert isinstance(node, ast.UnaryOp)
        made = ast.UnaryOp(node.op, parts[0])
    return ast.copy_location(made, node)
