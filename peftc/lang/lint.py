"""Lint: what a rule or form declares and nothing reads.

Works on the located tree alone, so that a file with mistakes gets its warnings too; names are compared with every
name that any expression reads, whether or not the expression is right.

    W002 warning: `z` of `let` is read nowhere
      --> mine.yaml:7:11
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peftc.diagnostics import Collector, Diagnostic, PeftcError, place
from peftc.lang.expr import calls_in, name_nodes
from peftc.lang.forms import expressions
from peftc.lang.grammar import tree_of
from peftc.lang.inherit import gathered
from peftc.lang.library import form_names, load_form
from peftc.lang.rule import Expr
from peftc.lang.source import compose
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def lint(text: str, file: str) -> list[Diagnostic]:
    """The warnings about a rule or form file, in source order; none where the text is no YAML mapping."""
    collector = Collector()
    try:
        tree = compose(text, file, Collector())
        if isinstance(tree, MappingNode):
            if "peftc-form" in tree.entries:
                _lint_form(tree, collector)
            else:
                _lint_rule(gathered(tree, text, file, Collector()), collector)
    except PeftcError as error:
        return [d for d in error.diagnostics if d.severity == "warning"]
    own = (d for d in collector.diagnostics if d.span is None or d.span.file == file)
    return sorted(own, key=place)


@dataclass(frozen=True, slots=True)
class _Reads:
    """The names a row reads: of its hyperparameters, and of its own."""

    names: frozenset[str]
    known: bool = True
    """False when the row's form is unknown, so that it may read any hyperparameter."""


def _lint_rule(tree: MappingNode, collector: Collector) -> None:
    rows = [row for _, row in _entries(tree.get("deltas")) if isinstance(row, MappingNode)]
    local = {key.text: body for key, body in _entries(tree.get("forms")) if isinstance(body, MappingNode)}
    for body in local.values():
        _lint_form(body, collector)
    found = [_lint_row(row, local, collector) for row in rows]
    used = {form.text for row in rows if isinstance(form := row.get("form"), ScalarNode)}
    for key, _ in _entries(tree.get("forms")):
        if key.text not in used:
            help = "take it out, or name it in a row"
            collector.warn("W008", f"no row has the form `{key.text}`", span=key.span, help=help)
    both = (*_entries(tree.get("rewrite")), *_entries(tree.get("carry")))
    entries = [entry for _, entry in both if isinstance(entry, MappingNode)]
    found += [_lint_entry(entry, collector) for entry in entries]
    _lint_patterns(tree, [*rows, *entries], collector)
    if not all(reads.known for reads in found):
        return
    read = frozenset[str]().union(*(reads.names for reads in found))
    for key, _ in _entries(tree.get("hyper")):
        if key.text not in read:
            help = "take it out, or use it in a row"
            collector.warn("W003", f"nothing reads the hyperparameter `{key.text}`", span=key.span, help=help)


def _lint_patterns(tree: MappingNode, rows: list[MappingNode], collector: Collector) -> None:
    """W009 for each pattern that no row names under `at` or `from`."""
    named = frozenset[str]().union(*(_values(row.get(key)) for row in rows for key in ("at", "from")))
    for key, _ in _entries(tree.get("patterns")):
        if key.text not in named:
            help = "take it out, or name it under `at:` of a row"
            collector.warn("W009", f"no row is at the pattern `{key.text}`", span=key.span, help=help)


def _lint_row(row: MappingNode, local: Mapping[str, MappingNode], collector: Collector) -> _Reads:
    """Warn of what the row declares and does not read; the hyperparameters it reads."""
    form = row.get("form")
    own = _names(row, "compose", "let", "from") | _params(row)
    known = True
    if isinstance(form, MappingNode):
        inside = _names(form, "expr", "attend", "let") | _params(form)
        _lint_parts(form, own | inside, collector, args="args")
    else:
        inside, known = _form_reads(row, form, local)
    read = own | inside
    if known:
        _lint_parts(row, read, collector)
        _lint_sources(row, inside | _names(row, "compose", "let"), collector)
    given = {key.text for key, _ in _entries(row.get("with"))}
    where = row.get("where")
    conditions = _names(where, "if") if isinstance(where, MappingNode) else frozenset[str]()
    return _Reads((read - given) | _values(row.get("with")) | conditions, known)


def _lint_entry(entry: MappingNode, collector: Collector) -> _Reads:
    """Warn of what an entry of `rewrite` or `carry` declares and does not read; the hyperparameters it reads."""
    read = _names(entry, "set", "value", "let", "from") | _params(entry)
    _lint_parts(entry, read, collector)
    _lint_sources(entry, _names(entry, "set", "value", "let"), collector)
    where = entry.get("where")
    conditions = _names(where, "if") if isinstance(where, MappingNode) else frozenset[str]()
    given = {key.text for key, _ in _entries(entry.get("with"))}
    return _Reads((read - given) | _values(entry.get("with")) | conditions)


def _form_reads(row: MappingNode, form: Node | None, local: Mapping[str, MappingNode]) -> tuple[frozenset[str], bool]:
    """What the form of a row reads from outside itself, and whether that is known."""
    name = form.text if isinstance(form, ScalarNode) else ""
    params = {key.text for part in ("params", "from") for key, _ in _entries(row.get(part))}
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or name in params:
        return _expression(form), isinstance(form, ScalarNode)
    if name in local:
        return _form_names(local[name]) - {key.text for key, _ in _entries(local[name].get("params"))}, True
    if name not in form_names():
        return frozenset(), False
    try:
        loaded = load_form(name)
    except PeftcError:
        return frozenset(), False
    read = {found for expr in expressions(loaded) for found in (*name_nodes(expr), *calls_in(expr))}
    return frozenset(read - {param.name for param in loaded.params} - {*loaded.let}), True


def _lint_form(tree: MappingNode, collector: Collector) -> None:
    _lint_parts(tree, _form_names(tree), collector, args="args")


def _form_names(tree: MappingNode) -> frozenset[str]:
    return _names(tree, "dh", "attend", "let") | _params(tree)


def _lint_parts(node: MappingNode, read: frozenset[str], collector: Collector, args: str = "") -> None:
    """W001, W002 and W004 for the names under `params`, `let` and `args` that are not in `read`."""
    kinds = [("params", "W001", "the parameter"), ("let", "W002", "the `let` name")]
    for section, code, what in [*kinds, *([(args, "W004", "the argument")] if args else [])]:
        for key, _ in _entries(node.get(section)):
            if key.text not in read:
                help = "take it out, or use it in an expression"
                collector.warn(code, f"nothing reads {what} `{key.text}`", span=key.span, help=help)


def _lint_sources(node: MappingNode, read: frozenset[str], collector: Collector) -> None:
    """W005 for the names under `from` that are not in `read`."""
    for key, _ in _entries(node.get("from")):
        if key.text not in read:
            message, help = f"nothing reads the `from` name `{key.text}`", "take it out, or use it in an expression"
            collector.warn("W005", message, span=key.span, help=help)


def _params(node: MappingNode) -> frozenset[str]:
    """Names that sizes, initial values and conditions of the `params` read."""
    parts = (value for _, value in _entries(node.get("params")) if isinstance(value, MappingNode))
    return frozenset[str]().union(*(_names(part, "shape", "init", "if", "lr") for part in parts))


def _names(node: MappingNode, *keys: str) -> frozenset[str]:
    """Names that the expressions under `keys` read or call."""
    return frozenset[str]().union(*(_values(node.get(key)) for key in keys))


def _values(node: Node | None) -> frozenset[str]:
    if isinstance(node, SequenceNode):
        return _union(node.items)
    if isinstance(node, MappingNode):
        return _union(value for _, value in node.entries.values())
    return _expression(node)


def _union(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset[str]().union(*(_values(node) for node in nodes))


def _expression(node: Node | None) -> frozenset[str]:
    """The names of one expression; all its words where it is no expression."""
    if not isinstance(node, ScalarNode):
        return frozenset()
    text = " ".join(node.text.split())
    try:
        expr = Expr(text, tree_of(text, None, False))
    except PeftcError:
        return frozenset(_NAME.findall(text))
    return frozenset((*name_nodes(expr), *calls_in(expr)))


def _entries(node: Node | None) -> list[tuple[ScalarNode, Node]]:
    return list(node.entries.values()) if isinstance(node, MappingNode) else []
