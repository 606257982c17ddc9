"""Reads patterns: from a file, or from their place under `patterns:` of a rule, to a checked `Pattern`.

>>> pattern = parse_pattern("peftc-pattern: 1\\nname: head\\nmatch: [out = tanh(x)]", "head.yaml")
>>> pattern.taps
{'out': 'out', 'x': 'x'}
"""

from __future__ import annotations

import keyword
import re

from peftc.diagnostics import Collector, Diagnostic, did_you_mean, fail
from peftc.lang.expr import name_nodes
from peftc.lang.forms import check_version
from peftc.lang.reading import RESERVED, Reader, value, word, words
from peftc.lang.rule import Expr
from peftc.lang.schema import PatternFile, check
from peftc.lang.sites import SITES
from peftc.lang.source import compose
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode
from peftc.patterns.build import build, check_line
from peftc.patterns.lines import Line, every_line, read_blocks, variants
from peftc.patterns.terms import Leaf, Pattern, Piece, Place, Shape, Variant, walk

_HEADER = re.compile(r"^['\"]?peftc-pattern['\"]?\s*:", re.MULTILINE)


def is_pattern(text: str) -> bool:
    """Whether a file is a pattern and not a rule, by its header; it need not be right otherwise."""
    return _HEADER.search(text) is not None


def parse_pattern(text: str, file: str) -> Pattern:
    """The pattern a file holds. Raises `PeftcError` with every mistake of the file."""
    collector = Collector()
    tree = compose(text, file, collector)
    if not isinstance(tree, MappingNode):
        fail("E009", f"{file} must be a mapping of `key: value`", span=tree.span)
    check_version(tree, "peftc-pattern", "pattern")
    tree = check(tree, PatternFile, collector)
    name = tree.get("name")
    found = read_pattern(name, tree, file, collector) if isinstance(name, ScalarNode) else None
    collector.raise_if_errors()
    assert found is not None
    return found


def read_patterns(node: Node | None, collector: Collector) -> dict[str, Pattern]:
    """The patterns under `patterns:` of a rule that have no mistake, by name."""
    found: dict[str, Pattern] = {}
    for name, (key, body) in node.entries.items() if isinstance(node, MappingNode) else ():
        pattern = read_pattern(key, body, body.span.file, collector) if isinstance(body, MappingNode) else None
        if pattern is not None:
            found[name] = pattern
    return found


def read_pattern(name: ScalarNode, body: MappingNode, file: str, collector: Collector) -> Pattern | None:
    """The pattern of that name whose keys `body` holds; its mistakes go to `collector`, and None comes back then."""
    if name.text in SITES:
        message = f"`{name.text}` already names a built-in kind of site"
        collector.error("E023", message, span=name.span, help="choose another name")
    elif not name.text.isidentifier() or keyword.iskeyword(name.text):
        help = "letters, digits and _, and no digit first"
        collector.error("E009", f"`{name.text}` is no name of a pattern", span=name.span, help=help)
    return _Reading(name, body, file, Collector()).pattern(collector)


class _Reading:
    """Reads one pattern; `own` gathers its mistakes, which alternatives of `any` would tell more than once."""

    def __init__(self, name: ScalarNode, body: MappingNode, file: str, own: Collector) -> None:
        self.name, self.body, self.file, self.own = name, body, file, own

    def pattern(self, collector: Collector) -> Pattern | None:
        found = self._variants()
        known = list(dict.fromkeys(name for variant in found for name in (*variant.values, *variant.leaves)))
        shapes = self._shapes(known, found) if found else ()
        dims = tuple(dict.fromkeys(size for shape in shapes for size in shape.sizes if isinstance(size, str)))
        pattern = Pattern(
            self.name.text,
            tuple(found),
            self._taps(known) if found else {},
            shapes,
            self._where(dims) if found else None,
            tuple(self._named("single", known)) if found else (),
            word(self.body.get("doc")) or "",
            self.file,
            self.name.span,
            dims,
        )
        told: dict[tuple[object, ...], Diagnostic] = {}
        for diagnostic in self.own.diagnostics:
            told.setdefault((diagnostic.code, diagnostic.message, diagnostic.span), diagnostic)
        collector.extend(told.values())
        return None if self.own.errors or not found else pattern

    def _variants(self) -> list[Variant]:
        blocks = read_blocks(self.body.get("match"), self.own)
        lines = list(every_line(blocks))
        good = [check_line(line, self.own) for line in lines]
        groups = variants(blocks, self.own) if all(good) and not self.own.errors else []
        match = self.body.get("match")
        empty = isinstance(match, SequenceNode) and not match.items
        if (empty or blocks) and not all(groups):
            help = "as in match: out = linear(x, W)"
            self.own.error("E010", "the pattern has no line to match", span=self.body.key("match").span, help=help)
        if not lines or self.own.errors:
            return []
        known = [name.text for line in lines for name in line.names]
        outputs = self._named("outputs", known)
        found = [(group, build(group, outputs, self.own)) for group in groups]
        for group, variant in found:
            if variant is not None:
                self._check_whole(group, variant)
        return [variant for _, variant in found if variant is not None]

    def _check_whole(self, lines: list[Line], variant: Variant) -> None:
        """E070 for a value that no output reads, E071 for an output that shares nothing with the others."""
        reached = {id(term) for term in walk(*variant.roots)}
        for line in lines:
            for name in line.names:
                term = variant.values.get(name.text)
                if term is None or id(term) in reached or isinstance(term, Leaf):
                    continue
                if isinstance(term, Piece) and any(id(part) in reached for part in term.siblings):
                    continue  # a part that is named so that the others are counted right
                outputs = ", ".join(dict.fromkeys((name.text, *variant.outputs)))
                help = f"take the line out, or say that it is an output as well: outputs: [{outputs}]"
                self.own.error("E070", f"no output reads `{name.text}`", span=name.span, help=help)
        self._check_connected(lines, variant)

    def _check_connected(self, lines: list[Line], variant: Variant) -> None:
        joined, *others = ((name, _parts(variant, name)) for name in reversed(variant.outputs))
        together, pending = joined[1], others
        while True:
            near = [entry for entry in pending if entry[1] & together]
            if not near:
                break
            together = together.union(*(parts for _, parts in near))
            pending = [entry for entry in pending if entry not in near]
        for name, _ in pending:
            place = next(place for line in lines for place in line.names if place.text == name)
            message = f"`{name}` shares no value with `{variant.outputs[-1]}`"
            help = "a pattern is one piece: its outputs are computed from a common value"
            self.own.error("E071", message, span=place.span, help=help)

    def _named(self, key: str, known: list[str]) -> list[Place]:
        """The values under `outputs` or `single`; E008 for one that the lines do not have."""
        found: list[Place] = []
        for item in words(self.body.get(key)):
            if item.text in known:
                found.append(Place(item.text, item.text, item.span))
            else:
                self._unknown(item, known)
        return found

    def _unknown(self, item: ScalarNode, known: list[str]) -> None:
        message = f"the lines of the pattern have no value `{item.text}`"
        self.own.error("E008", message, span=item.span, help=did_you_mean(item.text, known))

    def _taps(self, known: list[str]) -> dict[str, str]:
        """The taps as they are given; without, every name. Parameters are taps in any case."""
        given = self.body.get("taps")
        found: dict[str, str] = {}
        for tap, (key, item) in given.entries.items() if isinstance(given, MappingNode) else ():
            if tap in ("h", "dh"):
                message = f"`{tap}` already names {RESERVED[tap]}"
                self.own.error("E023", message, span=key.span, help="choose another name for the tap")
            elif isinstance(item, ScalarNode) and item.text not in known:
                self._unknown(item, known)
            elif isinstance(item, ScalarNode):
                found[tap] = item.text
        rest = [name for name in known if name not in found.values() and name not in found]
        rest = [name for name in rest if name[0].isupper()] if found else rest
        found |= {name: name for name in rest if name not in ("h", "dh")}
        if not found and not self.own.errors:
            help = "`h` and `dh` are words of expressions and no taps: give the value another name"
            self.own.error("E010", "no value of the pattern is a tap", span=self.name.span, help=help)
        return found

    def _shapes(self, known: list[str], found: list[Variant]) -> tuple[Shape, ...]:
        given, shapes = self.body.get("shapes"), []
        for name, (key, sizes) in given.entries.items() if isinstance(given, MappingNode) else ():
            if name not in known:
                self._unknown(key, known)
            elif not any(name in variant.leaves and name[0].isupper() for variant in found):
                message = f"`{name}` is no parameter"
                help = "`shapes` are those of parameters, whose names start with a capital"
                self.own.error("E009", message, span=key.span, help=help)
            elif isinstance(sizes, SequenceNode):
                texts = tuple(self._size(item, known) for item in sizes.items)
                shapes.append(Shape(name, texts, Place(name, name, sizes.span)))
        return tuple(shapes)

    def _size(self, item: Node, known: list[str]) -> str | int | None:
        text = word(item)
        if text is None:
            number = value(item)
            return number if isinstance(number, int) else None
        if text == "_":
            return None
        if text not in known and text.isidentifier():
            return text
        taken = text in known
        message = f"`{text}` already names a value" if taken else f"`{text}` is no name of a dimension"
        self.own.error("E023" if taken else "E009", message, span=item.span, help="as in [d_out, d_in]")
        return None

    def _where(self, dims: tuple[str, ...]) -> Expr | None:
        condition = Reader(self.own).expr(self.body.get("where"), "static")
        for name, node in name_nodes(condition).items() if condition is not None else ():
            if name not in dims:
                help = did_you_mean(name, dims) or "`shapes` names dimensions: W_up: [d_ff, d_model]"
                message = f"`shapes` names no dimension `{name}`"
                self.own.error("E008", message, span=condition.span_of(node) if condition else None, help=help)
        return condition


def _parts(variant: Variant, name: str) -> set[object]:
    """What an output is computed from: ops by identity, leaves by name."""
    found: set[object] = set()
    for term in walk(variant.values[name]):
        if isinstance(term, Leaf):
            found |= {term.name} - {"_"}
        else:
            found.add(id(term))
    return found
