"""What a rule takes from other packages: their forms and patterns, written into its text, and the names of the rest.

A delta directory must load where such a package is not installed. Forms and patterns are data, so the resolved rule
holds them; ops are code, so the directory records which packages they are from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from peftc.diagnostics import Collector
from peftc.lang.extensions import LIBRARY, extension_ops
from peftc.lang.library import catalogue, read, shown_file
from peftc.lang.source import compose
from peftc.lang.tree import MappingNode, Node, ScalarNode

_HEADER = frozenset({"peftc-form", "peftc-pattern", "name"})


def written_in(tree: MappingNode, forms: Iterable[str], patterns: Iterable[str]) -> MappingNode:
    """`tree` with those of `forms` and `patterns` that are another package's; `tree` itself where there are none."""
    for section, names in (("forms", forms), ("patterns", patterns)):
        own = tree.get(section)
        entries = dict(own.entries) if isinstance(own, MappingNode) else {}
        added = {name: _entry(section, name, tree) for name in sorted({*names}) if _is_foreign(section, name, entries)}
        if added:
            key = tree.key(section) if own is not None else _key(section, tree)
            body = MappingNode({**entries, **added}, tree.span, tree.size)
            tree = MappingNode({**tree.entries, section: (key, body)}, tree.span, tree.size)
    return tree


def _is_foreign(section: str, name: str, own: dict[str, tuple[ScalarNode, Node]]) -> bool:
    known = catalogue(section)
    return name not in own and name in known.items and known.origin(name) != LIBRARY


def _entry(section: str, name: str, tree: MappingNode) -> tuple[ScalarNode, Node]:
    item = catalogue(section).items[name]
    found = compose(read(item, shown_file(item)), shown_file(item), Collector())
    assert isinstance(found, MappingNode)  # it was read before, for the rule that names it
    body = {key: entry for key, entry in found.entries.items() if key not in _HEADER}
    return _key(name, tree), MappingNode(body, found.span, found.size)


def _key(name: str, tree: MappingNode) -> ScalarNode:
    return ScalarNode(name, name, tree.span, 0, 0, exact=False)


def op_packages(text: str) -> list[str]:
    """The packages that bring ops which a rule's text names."""
    known = extension_ops()
    return sorted({known.origin(word) for word in {*re.findall(r"[A-Za-z_]\w*", text)} & known.items.keys()})
