"""What a rule takes from other files: `extends` (another rule) and `include` (files of forms and patterns).

    peftc: 1
    name: mine
    extends: lora                      # a rule of the library, or a file beside this one: ../base.yaml
    include: [forms/gated.yaml]        # its form can be named in rows; a pattern likewise

`gathered` gives one tree that needs no other file. Every node keeps the span of the file it stands in. A rule comes
from strangers: files are .yaml or .yml, named relative to the file that names them (links are followed), and bounded in
depth, number and total size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from peftc.diagnostics import Collector, Diagnostic, PeftcError, Span
from peftc.lang.complaints import shown
from peftc.lang.forms import check_version, first_token
from peftc.lang.library import SUFFIXES, find, form_names, read, shown_file
from peftc.lang.overlay import mapping, overlay
from peftc.lang.reading import word, words
from peftc.lang.source import MAX_BYTES, MAX_SIZE, compose, read_text
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode

MAX_CHAIN = 8
"""Rules above a rule."""
MAX_FILES = 32

SECTIONS = {"peftc-form": ("form", "forms"), "peftc-pattern": ("pattern", "patterns")}
"""The header of each kind of file that can be included, with the kind's name and the section that it joins."""

Entries = dict[str, tuple[ScalarNode, Node]]


def gathered(tree: MappingNode, text: str, file: str, collector: Collector) -> MappingNode:
    """`tree` with what it extends and includes written in; `tree` itself where it does neither.

    Raises `PeftcError` with every mistake in finding and joining the files: E017, E018, E019, E023, E050.
    """
    if not {"extends", "include"} & tree.entries.keys():
        return tree
    before = len(collector.errors)
    whole = _Gatherer(collector, len(text)).whole(tree, file, (os.path.realpath(file),))
    if whole.size > MAX_SIZE:
        collector.error("E017", "the rule and the files it takes from are too large", span=first_token(tree))
    if len(collector.errors) > before:
        collector.raise_if_errors()
    return whole


@dataclass(slots=True)
class _Gatherer:
    collector: Collector
    size: int
    """Characters read so far, over all files."""
    files: int = 0
    sources: dict[str, str] = field(default_factory=dict)

    def whole(self, tree: MappingNode, file: str, chain: tuple[str, ...]) -> MappingNode:
        included = self._included(tree.get("include"), file)
        own = self._joined(tree, included)
        parent = self._parent(tree.get("extends"), file, chain)
        if parent is None:
            kept = {name: entry for name, entry in own.entries.items() if name not in ("extends", "include")}
            return mapping(kept, own)
        return overlay(_without(parent, included), own, self.collector)

    def _parent(self, node: Node | None, file: str, chain: tuple[str, ...]) -> MappingNode | None:
        if node is None:
            return None
        if not isinstance(node, ScalarNode) or not word(node):
            help = "as in extends: lora, or extends: base.yaml"
            self.collector.error("E009", "`extends` must be a rule's name or a file", span=node.span, help=help)
            return None
        found = self._found(node, file)
        if found is None:
            return None
        text, shown_as, place = found
        if place in chain:
            message = f"`{shown(node.text)}` extends itself" + (", by way of others" if place != chain[-1] else "")
            self.collector.error("E050", message, span=node.inner, help="a rule extends one that stands on its own")
            return None
        if len(chain) > MAX_CHAIN:
            message = f"more than {MAX_CHAIN} rules, each extending the next"
            self.collector.error("E017", message, span=node.inner, help="extend the rule that says most of it")
            return None
        tree = self._tree(text, shown_as, node.inner)
        if tree is None or not self._is(tree, ("peftc",), node):
            return None
        return self.whole(tree, shown_as, (*chain, place))

    def _included(self, node: Node | None, file: str) -> dict[str, Entries]:
        """The entries that included files add, by section; the key of each stands at the item that named the file."""
        sections: dict[str, Entries] = {}
        items = words(node)
        if node is not None and (not items or (isinstance(node, SequenceNode) and len(items) != len(node.items))):
            help = "as in include: [forms/mine.yaml]"
            self.collector.error("E009", "`include` must be a list of files", span=node.span, help=help)
        for item in items:
            found = self._found(item, file) if item.text.endswith(SUFFIXES) else self._no_file(item)
            tree = self._tree(found[0], found[1], item.inner) if found else None
            if tree is None:
                continue
            header = self._is(tree, tuple(SECTIONS), item)
            if header:
                self._add(sections.setdefault(SECTIONS[header][1], {}), tree, header, item)
        return sections

    def _no_file(self, item: ScalarNode) -> None:
        help = "rows name it without `include`" if item.text in form_names() else "the name of a file ends in .yaml"
        what = "a form of the library" if item.text in form_names() else "no file"
        self.collector.error("E018", f"`{shown(item.text)}` is {what}", span=item.inner, help=help)

    def _add(self, section: Entries, tree: MappingNode, header: str, item: ScalarNode) -> None:
        name = tree.get("name")
        if not isinstance(name, ScalarNode) or not word(name):
            message = f"{shown(item.text)} says no `name`" if name is None else "`name` must be a word"
            self.collector.error(
                "E010" if name is None else "E009", message, span=name.span if name else first_token(tree)
            )
            return
        if name.text in section:
            message = f"`{shown(name.text)}` is the name of two included files"
            self.collector.error("E023", message, span=item.inner, help="include one of them")
            return
        body = {key: entry for key, entry in tree.entries.items() if key not in (header, "name")}
        key = ScalarNode(name.text, name.value, item.inner, item.start, item.end, exact=False)
        section[name.text] = (key, mapping(body, tree))

    def _joined(self, tree: MappingNode, sections: dict[str, Entries]) -> MappingNode:
        """`tree` with the included entries beside its own."""
        entries = dict(tree.entries)
        for section, added in sections.items():
            own = tree.get(section)
            if own is not None and not isinstance(own, MappingNode):
                continue  # of a wrong type, which the schema tells
            for name, (key, _) in (own.entries if own else {}).items():
                if name in added:
                    message = f"`{shown(name)}` is included already"
                    self.collector.error("E023", message, span=key.span, help="choose another name")
            at = tree.key("include")
            key = tree.key(section) if own else ScalarNode(section, section, at.span, at.start, at.end, exact=False)
            entries[section] = (key, mapping({**added, **(own.entries if own else {})}, own or tree))
        return mapping(entries, tree)

    def _found(self, node: ScalarNode, owner: str) -> tuple[str, str, str] | None:
        """The text of a file, its name as shown, and what tells it from others; None after E018 or E017."""
        name = node.text
        if not name.endswith(SUFFIXES):
            if "/" not in name:
                return self._in_library(node)
            message, help = f"no rule `{shown(name)}` in the library", "the name of a file ends in .yaml"
        elif os.path.isabs(name):  # noqa: PTH117 -- takes any text
            message = f"`{shown(name)}` is an absolute path"
            help = "give it relative to this file, so that the rule can move"
        else:
            path = os.path.join(os.path.dirname(owner), name)  # noqa: PTH118, PTH120 -- keeps the name as written
            if os.path.isfile(path):  # noqa: PTH113 -- refuses no name
                return self._counted(node, self._read(path, node.inner), path)
            message, help = f"no file `{shown(name)}`", "a path is relative to the file it stands in"
        self.collector.error("E018", message, span=node.inner, help=help)
        return None

    def _in_library(self, node: ScalarNode) -> tuple[str, str, str] | None:
        try:
            item = find(node.text, "rule", "", "E018")
            text = read(item, shown_file(item))
        except PeftcError as error:
            self.collector.extend([_placed(d, node.inner) for d in error.diagnostics])
            return None
        return self._counted(node, text, shown_file(item))

    def _read(self, path: str, span: Span) -> str:
        try:
            return read_text(path)
        except PeftcError as error:
            raise PeftcError([_placed(d, span) for d in error.diagnostics]) from error

    def _counted(self, node: ScalarNode, text: str, file: str) -> tuple[str, str, str] | None:
        self.size += len(text)
        self.files += 1
        if self.size > MAX_BYTES or self.files > MAX_FILES:
            limit = f"{MAX_FILES} files" if self.files > MAX_FILES else f"{MAX_BYTES // 1024} KiB"
            message = f"the files that this rule takes from are more than {limit}"
            self.collector.error("E017", message, span=node.inner, help="a rule is a page of text")
            self.collector.raise_if_errors()
        return text, file, os.path.realpath(file)

    def _tree(self, text: str, file: str, span: Span) -> MappingNode | None:
        tree = compose(text, file, self.collector)
        if not isinstance(tree, MappingNode):
            self.collector.error("E009", f"{file} must be a mapping of `key: value`", span=span)
            return None
        return tree

    def _is(self, tree: MappingNode, headers: tuple[str, ...], item: ScalarNode) -> str:
        """The header of a file, one of `headers`; none after E019 (another kind of file, or version) or E010."""
        kinds = {"peftc": "rule", **{header: kind for header, (kind, _) in SECTIONS.items()}}
        header = next((key for key in kinds if key in tree.entries), "")
        wanted = " or ".join(kinds[key] for key in headers)
        if not header:
            help = f"a {kinds[headers[0]]} starts with `{headers[0]}: 1`"
            self.collector.error("E010", f"missing key `{headers[0]}`", span=first_token(tree), help=help)
        elif header not in headers:
            help = "`extends` takes a rule" if header == "peftc" else f"`include` takes a {kinds[header]}"
            message = f"`{shown(item.text)}` is a {kinds[header]}, not a {wanted}"
            self.collector.error("E019", message, span=item.inner, help=help)
        else:
            try:
                check_version(tree, header, kinds[header])
                return header
            except PeftcError as error:
                self.collector.extend(error.diagnostics)
        return ""


def _placed(diagnostic: Diagnostic, span: Span) -> Diagnostic:
    """`diagnostic` at the item that named the file, where it has no place of its own."""
    if diagnostic.span is not None:
        return diagnostic
    return Diagnostic(diagnostic.code, diagnostic.message, span, diagnostic.help, diagnostic.severity)


def _without(parent: MappingNode, sections: dict[str, Entries]) -> MappingNode:
    """`parent` without the entries that an included file replaces whole."""
    entries = dict(parent.entries)
    for section, added in sections.items():
        old = parent.get(section)
        if isinstance(old, MappingNode):
            kept = {name: entry for name, entry in old.entries.items() if name not in added}
            entries[section] = (parent.key(section), mapping(kept, old))
    return mapping(entries, parent)
