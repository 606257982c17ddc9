"""Expressions of rules: a closed subset of Python's expression grammar, parsed with `ast` and never run.

`parse` checks the grammar, the ops and their arguments; names are checked by who knows what is in scope
(`names_in`); sizes and conditions are computed with `evaluate_static`. Every mistake is told at its own token:

    E007 error: unknown op `rleu`
      --> mine.yaml:3:11
       |
    3  |   dh: "W @ rleu(x)"
       |            ^^^^
       = help: did you mean `relu`?
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache

from peftc.diagnostics import Collector, Span
from peftc.lang.grammar import Mode, check, tree_of
from peftc.lang.rule import Expr, Scalar
from peftc.lang.static import evaluate_static

__all__ = ["calls_in", "evaluate_static", "name_nodes", "names_in", "parse"]


def parse(
    text: str,
    span: Span | None = None,
    *,
    exact: bool = True,
    mode: Mode = "tensor",
    words: Mapping[str, Scalar] | None = None,
) -> Expr:
    """The checked expression `text`, which stands at `span`.

    `words` are form arguments and hyperparameters: one whose value is the name of an op may be called.
    Raises `PeftcError` with E011 (grammar), E007 (op), E012 (arguments) or E017 (too long, too deep, too large).
    """
    source = text.replace("\n", " ").replace("\r", " ").replace("\t", " ")
    lead = len(source) - len(source.lstrip())
    if span is not None and exact:
        start, end = (lead, len(source.rstrip())) if source.strip() else (0, 1)
        span = Span(span.file, span.line, span.col + start, span.col + end, span.text)
    source = source.strip()
    expr = Expr(source, tree_of(source, span, exact), span, exact)
    collector = Collector()
    check(expr, mode, words or {}, collector)
    collector.raise_if_errors()
    return expr


def names_in(expr: Expr) -> set[str]:
    """The free names of `expr`; names of called ops are not among them."""
    return set(name_nodes(expr))


def name_nodes(expr: Expr) -> dict[str, ast.Name]:
    """The names that `expr` reads, each with its first node; names of called ops are not among them."""
    return _walked(expr.tree)[0]


def calls_in(expr: Expr) -> dict[str, ast.Name]:
    """The names that `expr` calls, each with its first node."""
    return _walked(expr.tree)[1]


@lru_cache(maxsize=4096)
def _walked(tree: ast.expr) -> tuple[dict[str, ast.Name], dict[str, ast.Name]]:
    """The names read and the names called; kept, because a form of the library is asked again for every row."""
    nodes = list(ast.walk(tree))
    called = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    heads = {id(func) for func in called}
    for node in nodes:  # `row.param` of load(d, row.param) names what is stored elsewhere
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "load":
            heads |= {id(part) for argument in node.args[1:] for part in ast.walk(argument)}
    read: dict[str, ast.Name] = {}
    for node in nodes:
        if isinstance(node, ast.Name) and id(node) not in heads:
            read.setdefault(node.id, node)
    return read, {func.id: func for func in reversed(called)}
