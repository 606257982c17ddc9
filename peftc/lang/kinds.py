"""The kinds of sites a row may name: the built-in ones, the rule's own patterns, and the library's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftc.diagnostics import Collector
from peftc.lang.extensions import LIBRARY
from peftc.lang.library import catalogue, load_pattern, pattern_names
from peftc.lang.reading import words
from peftc.lang.sites import SITES, TAPS
from peftc.lang.tree import MappingNode, Node
from peftc.patterns.reading import read_patterns
from peftc.patterns.terms import Pattern


def kinds_of(node: Node | None, collector: Collector) -> Kinds:
    """The kinds that a rule with these `patterns:` knows. Reports the mistakes of the patterns, and E023."""
    written = node.entries if isinstance(node, MappingNode) else {}
    for name, (key, _) in written.items():
        if LIBRARY in catalogue("patterns").origins.get(name, []):
            message = f"`{name}` already names a pattern of the library"
            collector.error("E023", message, span=key.span, help="choose another name, or use the library's")
    return Kinds(read_patterns(node, collector), frozenset(written))


@dataclass(slots=True)
class Kinds:
    """What is known of each kind; a pattern of the rule's own hides one of another package."""

    own: Mapping[str, Pattern] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    """Names under `patterns:`, those with a mistake too."""
    used: dict[str, Pattern] = field(default_factory=dict)
    """The patterns that were asked for."""

    @property
    def names(self) -> list[str]:
        return [*SITES, *self.written, *pattern_names()]

    def pattern(self, name: str) -> Pattern | None:
        if name in SITES or name in self.used:
            return self.used.get(name)
        found = self.own.get(name)
        if found is None and name not in self.written:
            found = load_pattern(name)
        if found is not None:
            self.used[name] = found
        return found

    def taps(self, name: str) -> tuple[str, ...] | None:
        """The taps of a kind; None where there is no such kind, or its pattern has a mistake."""
        pattern = self.pattern(name)
        return SITES.get(name) if pattern is None else tuple(pattern.taps)

    def is_known(self, name: str) -> bool:
        return name in self.written or self.taps(name) is not None

    def of(self, row: MappingNode) -> dict[str, tuple[str, ...]]:
        """The kinds in a row's `at`, each with its taps."""
        found = ((item.text, self.taps(item.text)) for item in words(row.get("at")))
        return {name: taps for name, taps in found if taps is not None}

    def common_taps(self, row: MappingNode) -> frozenset[str]:
        """The taps that every site in the row's `at` has."""
        taps = [frozenset(taps) for taps in self.of(row).values()]
        return frozenset.intersection(*taps) if taps else TAPS

    def common_dims(self, row: MappingNode) -> frozenset[str]:
        """The dimensions that every site in the row's `at` has beside those of all kinds."""
        patterns = [self.pattern(name) for name in self.of(row)]
        dims = [frozenset(pattern.dims) if pattern is not None else frozenset[str]() for pattern in patterns]
        return frozenset.intersection(*dims) if dims else frozenset()
