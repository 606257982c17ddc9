"""YAML with places: a rule file as a small tree whose every node knows where it stands.

The tree is built from PyYAML's event stream, so nothing is constructed before it was checked: explicit tags, deep
nesting, alias bombs and recursion are refused while reading. Plain scalars follow the YAML 1.2 core schema:
`1e-4` is a number, `yes` and `on` are words.

    >>> tree = compose("hyper: {r: 64}", "mine.yaml", Collector())
    >>> tree.get("hyper").get("r").value, str(tree.get("hyper").get("r").span)
    (64, 'mine.yaml:1:12')
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from peftc.diagnostics import Collector, Span, fail
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode, resolve_plain

if TYPE_CHECKING:
    from importlib.abc import Traversable

MAX_BYTES = 128 * 1024
MAX_EVENTS = 20_000
MAX_DEPTH = 32
MAX_ALIASES = 64
MAX_ENTRIES = 512
"""Keys of one mapping, or items of one list."""
MAX_SIZE = 20_000
"""Nodes of the tree with every alias written out; a long scalar counts as one more for every 8 characters."""

_PAGE = "a rule is a page of text: is this the file?"
_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")


def read_text(path: str | os.PathLike[str] | Traversable, shown: str | None = None) -> str:
    """The text of a rule file; E001 when it cannot be read or is not UTF-8, E017 when it is too large."""
    name = shown or str(path)
    try:
        with (Path(path) if isinstance(path, (str, os.PathLike)) else path).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        fail("E001", f"cannot read {name}: {error.strerror or error}")
    if len(data) > MAX_BYTES:
        fail("E017", f"{name} is larger than {MAX_BYTES // 1024} KiB", help=_PAGE)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        col = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        whole = data.split(b"\n")[line - 1].decode("utf-8", "replace").rstrip("\r")
        fail("E001", "the file is not UTF-8", span=Span(name, line, col, col + 1, whole), help="save it as UTF-8")


def compose(text: str, file: str, collector: Collector) -> Node:
    """The located tree of one YAML document.

    Duplicate keys (E002), tags (E016) and infinite numbers (E009) go to `collector`; what leaves no tree to
    speak of raises: E001 (not YAML) and E017 (too large, too deep, too many aliases).
    """
    if len(text) > MAX_BYTES:
        fail("E017", f"{file} is larger than {MAX_BYTES // 1024} KiB", help=_PAGE)
    return _Composer(text.removeprefix("\ufeff"), file, collector).document()


@dataclass(slots=True)
class _Composer:
    text: str
    file: str
    collector: Collector
    lines: list[str] = field(default_factory=list)
    anchors: dict[str, Node | None] = field(default_factory=dict)
    """Anchored nodes; None while the node is still open, which makes an alias to it a recursion."""
    events: int = 0
    aliases: int = 0
    nodes: int = 0
    depth: int = 0
    stream: Iterator[yaml.Event] = field(default_factory=lambda: iter(()))

    def document(self) -> Node:
        self.lines = _BREAK.split(self.text)
        try:
            self.stream = yaml.parse(self.text, Loader=yaml.SafeLoader)
            return self._document()
        except yaml.reader.ReaderError as error:
            before = _BREAK.split(self.text[: error.position])
            self._not_yaml("a control character", self._span_at(len(before), len(before[-1]) + 1))
        except yaml.MarkedYAMLError as error:
            self._syntax_error(error)
        except (ValueError, OverflowError):  # an escape or %YAML version that is no number of this world
            self._not_yaml("an escape sequence that names no character", None)

    def _document(self) -> Node:
        event = self._next()
        while isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)):
            event = self._next()
        if isinstance(event, yaml.StreamEndEvent):
            fail("E001", f"{self.file} is empty", help="a rule starts with `peftc: 1`")
        root = self._node(event)
        self._next()
        if isinstance(event := self._next(), yaml.DocumentStartEvent):
            self._not_yaml("a second document", self._span(event), help="a rule file holds one document")
        return root

    def _next(self) -> yaml.Event:
        self.events += 1
        event = next(self.stream)
        if self.events > MAX_EVENTS:
            fail("E017", f"more than {MAX_EVENTS} YAML nodes", span=self._span(event), help=_PAGE)
        return event

    def _node(self, event: yaml.Event) -> Node:
        if isinstance(event, yaml.AliasEvent):
            node = self._alias(event)
        else:
            assert isinstance(event, yaml.NodeEvent)
            self._refuse_tag(event)
            if event.anchor is not None:
                self.anchors[event.anchor] = None
            node = self._fresh(event)
            if event.anchor is not None:
                self.anchors[event.anchor] = node
        return node

    def _fresh(self, event: yaml.NodeEvent) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            fail("E017", f"nested deeper than {MAX_DEPTH} levels", span=self._span(event), help=_PAGE)
        node = self._sequence(event) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(event)
        self.depth -= 1
        if node.size > MAX_SIZE:
            fail("E017", "too much text once aliases are written out", span=node.span, help=_PAGE)
        return node

    def _alias(self, event: yaml.AliasEvent) -> Node:
        self.aliases += 1
        span = self._span(event)
        if self.aliases > MAX_ALIASES:
            fail("E017", f"more than {MAX_ALIASES} aliases", span=span, help="write the values themselves")
        if event.anchor not in self.anchors:
            quote = "quote a value that starts with `*`"
            fail("E001", f"alias `*{event.anchor}` names no anchor", span=span, help=quote)
        node = self.anchors[event.anchor]
        if node is None:
            fail("E017", f"alias `*{event.anchor}` holds itself", span=span, help="write the value itself")
        if isinstance(node, ScalarNode):
            start, end = event.start_mark.index, event.end_mark.index
            return ScalarNode(node.text, node.value, span, start, end, exact=False, size=node.size)
        return node

    def _scalar(self, event: yaml.ScalarEvent) -> ScalarNode:
        start, end = event.start_mark.index, event.end_mark.index
        span = self._span(event)
        quoted = event.style in ("'", '"')
        if any(not (c.isprintable() or c in "\n\t\r") or "\ud800" <= c <= "\udfff" for c in event.value):
            self._not_yaml("a control character", span, "leave it out")
        value = event.value if event.style else resolve_plain(event.value)
        if isinstance(value, float) and not math.isfinite(value):
            message = f"`{event.value}` is not a finite number"
            self.collector.error("E009", message, span=span, help="quote it if the word is meant")
            value = 1
        written = self.text[start:end]
        exact = (written[1:-1] if quoted else written) == event.value and "\n" not in written
        shared, size = event.anchor is not None, 1 + len(event.value) // 8
        return ScalarNode(event.value, value, span, start, end, exact, shared, size)

    def _sequence(self, event: yaml.SequenceStartEvent) -> SequenceNode:
        items: list[Node] = []
        while not isinstance(inner := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(inner))
            self._refuse_crowd(len(items), inner, "items of one list")
        start, end = event.start_mark.index, inner.end_mark.index
        if not event.flow_style:  # a block ends where the next token starts
            end = start + len(self.text[start:end].rstrip())
        size = 1 + sum(item.size for item in items)
        return SequenceNode(tuple(items), self._span(event, inner), size, start, end, event.anchor is not None)

    def _mapping(self, event: yaml.NodeEvent) -> MappingNode:
        entries: dict[str, tuple[ScalarNode, Node]] = {}
        size = 1
        while not isinstance(inner := self._next(), yaml.MappingEndEvent):
            key = self._node(inner)
            value = self._node(self._next())
            size += 1 + value.size
            self._refuse_crowd(len(entries) + 1, inner, "keys of one mapping")
            if not isinstance(key, ScalarNode):
                help = "quote an expression that starts with `{` or `[`"
                self.collector.error("E009", "a key must be a word", span=key.span, help=help)
            elif key.text in entries:
                first = entries[key.text][0].span
                message = f"duplicate key `{key.text}`"
                self.collector.error("E002", message, span=key.span, help=f"first given in line {first.line}")
            else:
                entries[key.text] = (key, value)
        return MappingNode(entries, self._span(event, inner), size)

    def _refuse_crowd(self, count: int, event: yaml.Event, what: str) -> None:
        if count > MAX_ENTRIES:
            fail("E017", f"more than {MAX_ENTRIES} {what}", span=self._span(event), help=_PAGE)

    def _refuse_tag(self, event: yaml.NodeEvent) -> None:
        tag = getattr(event, "tag", None)
        if tag is None:
            return
        start = self.text.index("!", event.start_mark.index)
        written = re.match(r"!<[^>]*>|[^\s,\[\]{}]*", self.text[start : start + 200])
        width = len(written.group()) if written else 1
        line, col = event.start_mark.line + 1, event.start_mark.column + 1 + start - event.start_mark.index
        span = Span(self.file, line, col, col + width, self._line(line))
        self.collector.error("E016", "YAML tags are refused", span=span, help="write the plain value")

    def _line(self, number: int) -> str:
        return self.lines[number - 1] if number <= len(self.lines) else ""

    def _span_at(self, line: int, col: int) -> Span:
        return Span(self.file, line, col, col + 1, self._line(line))

    def _span(self, event: yaml.Event, last: yaml.Event | None = None) -> Span:
        start, end = event.start_mark, (last or event).end_mark
        text = self._line(start.line + 1)
        end_col = end.column if end.line == start.line else len(text.rstrip())
        return Span(self.file, start.line + 1, start.column + 1, max(start.column + 2, end_col + 1), text)

    def _not_yaml(self, what: str, span: Span | None, help: str | None = None) -> NoReturn:
        fail("E001", f"not readable as YAML: {what}", span=span, help=help)

    def _syntax_error(self, error: yaml.MarkedYAMLError) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        if "end of stream" in (error.problem or "") and error.context_mark is not None:
            mark = error.context_mark  # where the quote was opened
        span = self._span_at(mark.line + 1, mark.column + 1) if mark else None
        problem = error.problem or "syntax error"
        if "tag" in problem:
            fail("E016", f"YAML tags are refused ({problem})", span=span, help="write the plain value")
        self._not_yaml(problem, span, _syntax_help(problem))


def _syntax_help(problem: str) -> str | None:
    if "'\\t'" in problem:
        return "indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return "quote a value that holds `: `, and indent keys of one mapping alike"
    if "cannot start any token" in problem or "alphabetic or numeric" in problem:
        return "quote a value that starts with a character YAML reserves (* & @ % ` ! | >)"
    if "<block end>" in problem:
        return "indent keys of one mapping alike"
    if "end of stream" in problem:
        return "this quote is never closed"
    if "got '?'" in problem:
        return "inside `{ }`, quote a key that ends in a question mark"
    if "',' or" in problem:
        return "close each `{` and `[`, and put a comma between entries"
    return None
