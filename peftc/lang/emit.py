"""Writes a located tree as YAML that reads back as the same tree: what a delta directory keeps of a rule that takes
from other files.

Mappings and lists stand on one line where they fit. Comments are not part of a tree, and are lost.
"""

from __future__ import annotations

import json
import re

from peftc.diagnostics import fail
from peftc.lang.rule import Scalar
from peftc.lang.source import MAX_BYTES, MAX_EVENTS
from peftc.lang.tree import MappingNode, Node, ScalarNode, resolve_plain

WIDTH = 110
_BLOCK = frozenset({"hyper", "carry", "deltas", "rewrite", "forms", "patterns", "tests"})
"""Keys at the top whose entries stand on lines of their own."""
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_PHRASE = re.compile(r"[A-Za-z_(][A-Za-z0-9_.+*/() -]*[A-Za-z0-9_)]|[A-Za-z_]")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def written(value: Scalar) -> str:
    """`value` as YAML, a scalar or a list in brackets, that reads back as itself."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, str):
        plain = _WORD.fullmatch(value) and resolve_plain(value) == value
        return value if plain else json.dumps(value, ensure_ascii=False)
    return repr(value)


def emit(tree: MappingNode) -> str:
    """The text of a whole file. Raises `PeftcError` E017 when it would be larger than a file may be."""
    lines: list[str] = []
    for key, value in tree.entries.values():
        _entry(lines, key, value, "", split=key.text in _BLOCK)
    text = "\n".join(lines) + "\n"
    if len(text.encode()) > MAX_BYTES or _events(tree) > MAX_EVENTS - 8:
        fail("E017", "the rule is too large once all that it takes from other files is written in", span=tree.span)
    return text


def _entry(lines: list[str], key: ScalarNode, value: Node, indent: str, *, split: bool = False) -> None:
    """The lines of one entry, in one line where it fits; `split` gives the entries of its value lines of their own."""
    head = f"{indent}{_key(key.text)}:"
    line = f"{head} {_flow(value)}"
    if not isinstance(value, MappingNode) or not value.entries or (len(line) <= WIDTH and not split):
        lines.append(line)
        return
    lines.append(head)
    for inner, item in value.entries.values():
        _entry(lines, inner, item, indent + "  ")


def _flow(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return _scalar(node)
    if isinstance(node, MappingNode):
        return "{" + ", ".join(f"{_key(key.text)}: {_flow(value)}" for key, value in node.entries.values()) + "}"
    return "[" + ", ".join(_flow(item) for item in node.items) + "]"


def _scalar(node: ScalarNode) -> str:
    value = node.value
    if isinstance(value, str):
        return value if _PHRASE.fullmatch(value) and resolve_plain(value) == value else written(value)
    plain = node.text and resolve_plain(node.text) == value and node.text.isprintable()
    return node.text if plain else written(value)  # 1e-4 stays as it was written


def _key(text: str) -> str:
    return text if _KEY.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _events(node: Node) -> int:
    if isinstance(node, ScalarNode):
        return 1
    if isinstance(node, MappingNode):
        return 2 + sum(1 + _events(value) for _, value in node.entries.values())
    return 2 + sum(_events(item) for item in node.items)
