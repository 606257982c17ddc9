"""Overlay: a rule that `extends` another, laid over it, tree on tree.

Both trees keep their spans, so that a mistake is told in the file it stands in. Mappings of names (rows,
hyperparameters, forms, and inside a row `where`, `with`, `params`, `let`) are merged key by key; any other value of
the child replaces the parent's; `null` removes what the parent has.

    parent  lora: {at: attention, modify: [q, v], form: low_rank, with: {p: 0.1}}
    child   lora: {where: {layers: first 4}, with: {p: null}}
    result  lora: {at: attention, modify: [q, v], form: low_rank, with: {}, where: {layers: first 4}}
"""

from __future__ import annotations

from dataclasses import dataclass

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.complaints import shown
from peftc.lang.tree import MappingNode, Node, ScalarNode

Merged = dict[str, "Merged"]
"""The keys whose mappings are merged, each with what is merged inside; `*` stands for every key."""

_ROW: Merged = {"where": {}, "with": {}, "params": {"*": {}}, "let": {}, "from": {}, "set": {}}
_FORM: Merged = {"args": {}, "params": {"*": {}}, "let": {}}
_RULE: Merged = {
    "hyper": {"*": {"layers": {}}},
    "carry": {"*": _ROW},
    "deltas": {"*": _ROW},
    "rewrite": {"*": _ROW},
    "forms": {"*": _FORM},
    "patterns": {"*": {}},
}
_ROWS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("deltas",): ("at", "modify", "form"),
    ("rewrite",): ("at", "set"),
    ("carry",): ("at", "value"),
}
"""Where rows stand, with the keys that a row of its own has."""
NOT_INHERITED = frozenset({"peftc", "extends", "include", "tests"})
_EITHER = {"default": "budget", "budget": "default"}
"""Keys of a hyperparameter of which one takes the other's place."""


def overlay(parent: MappingNode, child: MappingNode, collector: Collector) -> MappingNode:
    """`child` laid over the rule `parent`; E050 for what changes or removes something the parent has not."""
    entries = {name: child.entries[name] for name in ("peftc",) if name in child.entries}
    entries |= {name: entry for name, entry in parent.entries.items() if name not in NOT_INHERITED}
    inherited = MappingNode(entries, parent.span)
    own = {name: entry for name, entry in child.entries.items() if name not in ("extends", "include")}
    return _Overlay(collector).mapping(inherited, MappingNode(own, child.span), _RULE, ())


def mapping(entries: dict[str, tuple[ScalarNode, Node]], like: Node) -> MappingNode:
    """A mapping of `entries` that stands where `like` does, its size counted."""
    return MappingNode(entries, like.span, 1 + sum(1 + value.size for _, value in entries.values()))


@dataclass(frozen=True, slots=True)
class _Overlay:
    collector: Collector

    def mapping(self, old: MappingNode, new: MappingNode, merged: Merged, path: tuple[str, ...]) -> MappingNode:
        entries = dict(old.entries)
        for name, (key, value) in new.entries.items():
            if _is_null(value) and name in entries:
                del entries[name]
            elif _is_null(value) and path[-1:] not in (("with",), ("args",)):  # there, null is a value
                self._nothing_to_remove(old, key, path)
            elif name not in entries:
                if path not in _ROWS or self._is_row(old, key, value, _ROWS[path]):
                    entries[name] = (key, value)
            else:
                inner, old_value = merged.get(name, merged.get("*")), entries[name][1]
                if path[:1] == ("hyper",) and path[2:] == ("layers",):
                    del entries[name]  # of selectors that meet, the last one wins: the child's comes last
                entries[name] = (key, self._value(old_value, value, inner, (*path, name)))
            if path[:1] == ("hyper",) and len(path) == 2 and name in _EITHER and not _is_null(value):
                entries.pop(_EITHER[name], None)
        return mapping(entries, new)

    def _value(self, old: Node, new: Node, merged: Merged | None, path: tuple[str, ...]) -> Node:
        if path[:1] == ("hyper",) and len(path) == 2 and isinstance(old, MappingNode) != isinstance(new, MappingNode):
            old, new = _with_default(old), _with_default(new)  # `r: 4` is the default alone, and keeps the bounds
        if merged is None or not isinstance(old, MappingNode):
            return new
        return self.mapping(old, new, merged, path) if isinstance(new, MappingNode) else new

    def _nothing_to_remove(self, old: MappingNode, key: ScalarNode, path: tuple[str, ...]) -> None:
        message = f"`{shown(key.text)}: null` removes nothing: the rule that is extended has no such entry"
        place = f" of `{path[-1]}`" if path else ""
        help = (
            did_you_mean(key.text, old.entries.keys() - {"peftc"}) or f"leave it out; nothing{place} is there to remove"
        )
        self.collector.error("E050", message, span=key.span, help=help)

    def _is_row(self, old: MappingNode, key: ScalarNode, value: Node, needed: tuple[str, ...]) -> bool:
        """Whether a row that the parent has not is one of its own; a part of a row is a misspelt name."""
        if not isinstance(value, MappingNode) or set(needed) & value.entries.keys():
            return True
        message = f"the rule that is extended has no row `{shown(key.text)}` to change"
        needs = " and ".join([", ".join(f"`{name}`" for name in needed[:-1]), f"`{needed[-1]}`"])
        help = did_you_mean(key.text, old.entries) or f"a new row needs {needs}"
        self.collector.error("E050", message, span=key.span, help=help)
        return False


def _with_default(node: Node) -> Node:
    if isinstance(node, MappingNode):
        return node
    name = ScalarNode("default", "default", node.span, node.start, node.end, exact=False)
    return mapping({"default": (name, node)}, node)


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.value is None
