"""Amounts: the part of a hyperparameter that `--set` replaces, its `default` or its `budget`.

    r: 8                                  the default alone
    r: {default: 8, min: 1}
    r: {budget: 0.5%}                     as many as half a percent of the base's parameters allow
    ids: [11, 12, 40]                     a list, whose default it is
    r: {budget: 300000, min: 4}           as many as 300,000 parameters allow, and no fewer than 4

`rewrite` and `with_amounts` put set values into the text or the tree of a rule, so that loading it gives the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from peftc.diagnostics import Span
from peftc.lang.emit import written
from peftc.lang.rule import Budget, Hyper, Scalar
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode

PERCENT = r"([0-9]{1,3}(\.[0-9]{1,12})?|\.[0-9]{1,12})\s*%"


def budget_of(given: object, span: Span | None = None) -> Budget | None:
    """The budget that a percentage (as a word) or a count says; None when `given` is neither, or nothing."""
    if isinstance(given, str) and re.fullmatch(rf"\s*{PERCENT}\s*", given):
        share = Fraction(given.strip().rstrip("%").strip())
        return Budget("".join(given.split()), percent=share, span=span) if share else None
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return Budget(str(given), count=given, span=span)
    return None


def amount(entry: Node) -> tuple[ScalarNode | None, ScalarNode | None]:
    """The key `default` or `budget` of an entry of `hyper:`, none where the entry is the value alone, and its value.

    A list is given as one value, the whole numbers in it.
    """
    if isinstance(entry, MappingNode):
        for name in ("default", "budget"):
            value = _one(entry.get(name))
            if value is not None:
                return entry.key(name), value
    return None, _one(entry)


def _one(node: Node | None) -> ScalarNode | None:
    if not isinstance(node, SequenceNode):
        return node if isinstance(node, ScalarNode) else None
    value = tuple(item.value for item in node.items if isinstance(item, ScalarNode) and type(item.value) is int)
    return ScalarNode("", value, node.span, node.start, node.end, exact=False, shared=node.shared, size=node.size)


def rewrite(text: str, node: Node | None, hypers: Mapping[str, Hyper], dropped: tuple[int, int] | None = None) -> str:
    """`text` with the amounts of `hypers` in place of those that differ, and without the part `dropped`."""
    edits: list[tuple[int, int, str]] = [] if dropped is None else [(*dropped, "")]
    for _, key, old, name, new in _changed(node, hypers):
        if key is not None and key.text != name:
            edits.append((key.start, key.end, name))
        replacement = f"{{{name}: {new}}}" if key is None and name == "budget" else new
        if isinstance(old.value, tuple) and text[old.start] == "-":  # a block may stand as far left as its key
            replacement = f"  {replacement}"
        tail = "\n" if text[old.start : old.end].endswith("\n") else ""
        edits.append((old.start, old.end, replacement + tail))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def with_amounts(node: Node | None, hypers: Mapping[str, Hyper]) -> Node | None:
    """The tree of `hyper:` with the amounts of `hypers` in place of those that differ; see `rewrite`."""
    if not isinstance(node, MappingNode):
        return node
    entries = dict(node.entries)
    for hyper, key, old, name, new in _changed(node, hypers):
        at, entry = node.entries[hyper]
        value = ScalarNode(new, _amount(hypers[hyper])[1], old.span, old.start, old.end, exact=False)
        named = ScalarNode(name, name, old.span, old.start, old.end, exact=False)
        rest = entry.entries if isinstance(entry, MappingNode) else {}
        if key is None and name == "default":
            entries[hyper] = (at, value)
            continue
        kept = {part: found for part, found in rest.items() if key is None or part != key.text}
        entries[hyper] = (at, MappingNode({name: (named, value), **kept}, entry.span, entry.size + 2))
    return MappingNode(entries, node.span, node.size)


def _changed(
    node: Node | None, hypers: Mapping[str, Hyper]
) -> list[tuple[str, ScalarNode | None, ScalarNode, str, str]]:
    """Amounts that differ from those written: whose, key and value as written, and what they are to be."""
    found: list[tuple[str, ScalarNode | None, ScalarNode, str, str]] = []
    for name, (_, entry) in node.entries.items() if isinstance(node, MappingNode) else ():
        key, old = amount(entry)
        if old is None or name not in hypers:
            continue
        kind, value = _amount(hypers[name])
        same = same_value(old.value, value) or (kind == "budget" and budget_of(old.value) == budget_of(value))
        if not same or kind != (key.text if key else "default"):
            budget = hypers[name].budget
            found.append((name, key, old, kind, budget.text if budget else written(value)))
    return found


def _amount(hyper: Hyper) -> tuple[str, Scalar]:
    if hyper.budget is None:
        return "default", hyper.value
    return "budget", hyper.budget.text if hyper.budget.percent is not None else hyper.budget.count


def same_value(left: Scalar, right: Scalar) -> bool:
    return left == right and type(left) is type(right)
