"""A YAML document as a tree of located nodes, and the values of unquoted scalars by YAML 1.2's core schema.

Every node knows its `Span`; a scalar also knows which characters of the source it is, so that it can be rewritten in
place. `1e-4` is a number here, `yes` and `on` are words.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from peftc.diagnostics import Span
from peftc.lang.rule import Scalar

MAX_DIGITS = 32

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A scalar: its `text` without quotes and its `value`; source[start:end] is how it is written."""

    text: str
    value: Scalar
    span: Span
    start: int
    end: int
    exact: bool
    """Whether `text` stands in the source character for character, from `inner` on."""
    shared: bool = False
    """Whether the value carries an anchor, so that aliases may repeat it."""
    size: int = 1

    @property
    def inner(self) -> Span:
        """The span of the text alone, without its quotes; the whole scalar when the text is not there verbatim."""
        if not self.exact or self.span.end_col - self.span.col == len(self.text):
            return self.span
        span = self.span
        return Span(span.file, span.line, span.col + 1, span.end_col - 1, span.text)


@dataclass(frozen=True, slots=True)
class SequenceNode:
    """A list; source[start:end] is how it is written."""

    items: tuple[Node, ...]
    span: Span
    size: int = 1
    start: int = 0
    end: int = 0
    shared: bool = False
    """Whether it carries an anchor, so that aliases may repeat it."""


@dataclass(frozen=True, slots=True)
class MappingNode:
    """A mapping; keys are unique and in source order."""

    entries: dict[str, tuple[ScalarNode, Node]]
    span: Span
    size: int = 1

    def get(self, key: str) -> Node | None:
        entry = self.entries.get(key)
        return entry[1] if entry else None

    def key(self, name: str) -> ScalarNode:
        return self.entries[name][0]


Node = ScalarNode | SequenceNode | MappingNode


def plain(node: Node) -> object:
    """The tree as dictionaries, lists and scalars."""
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, SequenceNode):
        return [plain(item) for item in node.items]
    return {key: plain(value) for key, (_, value) in node.entries.items()}


def without(node: Node, paths: set[tuple[str | int, ...]]) -> Node:
    """The tree without the nodes at `paths`."""
    heads = {path[0] for path in paths if len(path) == 1}
    if isinstance(node, MappingNode):
        kept = {
            key: (name, without(value, {path[1:] for path in paths if path[0] == key and len(path) > 1}))
            for key, (name, value) in node.entries.items()
            if key not in heads
        }
        return MappingNode(kept, node.span, node.size)
    if isinstance(node, SequenceNode):
        items = (
            without(item, {path[1:] for path in paths if path[0] == index and len(path) > 1})
            for index, item in enumerate(node.items)
            if index not in heads
        )
        return SequenceNode(tuple(items), node.span, node.size, node.start, node.end, node.shared)
    return node


def resolve_plain(text: str) -> Scalar:
    """The value of an unquoted scalar by the YAML 1.2 core schema; a number longer than 32 digits stays a word."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text, 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)
    if _FLOAT.fullmatch(text):
        named = text.lower().lstrip("+-")
        return math.nan if named == ".nan" else math.inf if named == ".inf" else float(text)
    return text
