"""Tests inside rules: reads `tests:` into cases, one for each family that a test names.

    tests:
      folds:
        family: [encoder, decoder]
        hyper: {r: 4}
        sites: 2
        trained: [4 * r * 64, 2 * r * (64 + 48)]
        fold: merged

A value may stand for all families, or be a list of one value each. What a case says is only read here; what holds is
found by `peftc.checking.rule_tests`. No torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from peftc.checking.families import NAMES
from peftc.diagnostics import Collector, Diagnostic, PeftcError, Span, did_you_mean
from peftc.lang import hypers
from peftc.lang.complaints import shown
from peftc.lang.expr import name_nodes
from peftc.lang.reading import Reader, Scope, value, word, words
from peftc.lang.rows import RowReader
from peftc.lang.rule import Case, Hyper, SameAs, Scalar
from peftc.lang.static import evaluate_static
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode

EXPECTATIONS = ("sites", "trained", "identity", "fold", "not", "same_as", "error")


@dataclass(slots=True)
class CaseReader:
    """Reads the tests of one rule: `hyper` is its section of that name, `values` what that says."""

    hyper: Node | None
    values: Mapping[str, Hyper]
    rows: tuple[str, ...]
    """The names under `carry`, `deltas` and `rewrite`."""
    row_reader: RowReader
    collector: Collector
    written: Node | None = None
    """`tests:` with what is wrong in it, which is no reason to say that a test expects nothing."""
    carried: Collection[str] = ()
    """The names under `carry`, which do not fold."""

    def cases(self, node: Node | None) -> tuple[Case, ...]:
        """Every case of `tests:`, in source order; E061, E062 and what else is wrong goes to the collector."""
        entries = node.entries.values() if isinstance(node, MappingNode) else ()
        return tuple(case for key, item in entries if isinstance(item, MappingNode) for case in self._case(key, item))

    def _case(self, key: ScalarNode, node: MappingNode) -> list[Case]:
        families = self._families(node)
        code = self._code(node)
        given = self._hyper(node.get("hyper"), code)
        written = self.written.get(key.text) if isinstance(self.written, MappingNode) else node
        written = written if isinstance(written, MappingNode) else node
        said = [name for name in EXPECTATIONS if name in written.entries]
        if not said:
            help = f"say one of {', '.join(EXPECTATIONS)}"
            self.collector.error("E062", f"test `{key.text}` expects nothing", span=key.span, help=help)
        if "error" in said and len(said) > 1:
            other = next(name for name in said if name != "error")
            message = f"`{other}` of a rule that must be refused"
            help = "a test says `error` alone, or what holds where the rule applies"
            self.collector.error("E062", message, span=written.key(other).span, help=help)
        count = len(families)
        sites = self._by_row(node, "sites", count)
        folds = self._by_row(node, "fold", count)
        trained = self._trained(node, count, given)
        identity = [value(item) for item in self._each(node, "identity", count)]
        forbidden = self.row_reader.where(node.get("not")) if "not" in node.entries else None
        same, spans = self._same_as(node.get("same_as")), _spans(node)
        return [
            Case(
                key.text,
                family,
                self._head(node) if position == 0 else word(node.get("head")),
                given,
                {row: count for row, count in sites[position].items() if isinstance(count, int)},
                trained[position],
                identity[position] is True if isinstance(identity[position], bool) else None,
                {row: result for row, result in folds[position].items() if isinstance(result, str)},
                forbidden,
                same,
                code,
                key.span,
                spans | _spans_of(node, position),
            )
            for position, family in enumerate(families)
        ]

    def _families(self, node: MappingNode) -> list[str]:
        found: list[str] = []
        for item in words(node.get("family")):
            if item.text not in NAMES:
                message = f"unknown family `{shown(item.text)}`"
                self.collector.error("E061", message, span=item.span, help=did_you_mean(item.text, NAMES))
            elif item.text in found:
                self.collector.error("E023", f"`{item.text}` is named twice", span=item.span, help="name it once")
            found.append(item.text)
        given = node.get("family")
        if isinstance(given, SequenceNode) and not given.items:
            help = "a word, or a list of at least one"
            self.collector.error("E009", "an empty list, where a family is expected", span=given.span, help=help)
        return found

    def _head(self, node: MappingNode) -> str | None:
        from peftc.store.heads import HEADS

        given = node.get("head")
        if isinstance(given, ScalarNode) and word(given) and given.text not in HEADS:
            message = f"unknown head `{shown(given.text)}`"
            self.collector.error("E032", message, span=given.span, help=did_you_mean(given.text, HEADS))
        return word(given)

    def _code(self, node: MappingNode) -> str | None:
        from peftc.reference.explain import ENTRIES

        given = node.get("error")
        code = word(given)
        known = [name for name in ENTRIES if name.startswith("E")]
        if given is not None and code is not None and code not in known:
            near = did_you_mean(code, known) or ""
            help = near if near.startswith("did") else "`peftc explain` lists the codes; errors start with E"
            self.collector.error("E061", f"unknown code `{shown(code)}`", span=given.span, help=help)
        return code

    def _hyper(self, node: Node | None, code: str | None) -> dict[str, Scalar]:
        """The case's hyperparameters; a wrong one is no mistake where its code is what the case expects."""
        found: dict[str, Scalar] = {}
        for name, (key, item) in node.entries.items() if isinstance(node, MappingNode) else ():
            if not isinstance(self.hyper, MappingNode) or name not in self.hyper.entries:
                message = f"the rule has no hyperparameter `{shown(name)}`"
                help = did_you_mean(name, self.values) or "this rule has no hyperparameters"
                self.collector.error("E015", message, span=key.span, help=help)
            elif (given := hypers.written_value(item)) is not None:
                private = Collector()
                resolved = hypers.resolve(self.hyper, {name: given}, private)
                own = [told for told in private.errors if f"`{name}`" in told.message]
                wrong = [told for told in own if told.code != code]
                messages = (re.sub(r"^`--set [^`]*`: ", "", told.message) for told in wrong)
                self.collector.extend(
                    Diagnostic(told.code, message, item.span, told.help)
                    for told, message in zip(wrong, messages, strict=True)
                )
                found[name] = resolved[name].value if name in resolved and not own else given
        return found

    def _each(self, node: MappingNode, key: str, count: int) -> list[Node | None]:
        """The value of `key` for each family: one for all, or the items of a list."""
        given = node.get(key)
        if not isinstance(given, SequenceNode):
            return [given] * count
        if count and len(given.items) != count:
            values = f"{len(given.items)} value" + ("" if len(given.items) == 1 else "s")
            message = f"`{key}` lists {values} for {count} {'family' if count == 1 else 'families'}"
            help = "one value for all families, or a list of one for each"
            self.collector.error("E062", message, span=given.span, help=help)
        return [*given.items, *[None] * count][:count]

    def _by_row(self, node: MappingNode, key: str, count: int) -> list[dict[str, Scalar]]:
        """`sites` and `fold`: a value for every row, or a mapping of rows to values."""
        found: list[dict[str, Scalar]] = []
        given = node.get(key)
        rows = self.rows if key == "sites" else tuple(row for row in self.rows if row not in self.carried)
        for position, item in enumerate(self._each(node, key, count)):
            if isinstance(item, MappingNode):
                if position == 0 or isinstance(given, SequenceNode):
                    self._known_rows(item, rows)
                found.append({row: value(inner) for row, (_, inner) in item.entries.items()})
            else:
                if item is not None and not rows and position == 0:
                    message = f"`{key}` of a rule without rows"
                    self.collector.error("E062", message, span=node.key(key).span, help="say `trained`, for one")
                found.append(dict.fromkeys(rows, value(item)) if item is not None else {})
        return found

    def _known_rows(self, node: MappingNode, rows: Collection[str]) -> None:
        for name, (key, _) in node.entries.items():
            if name not in rows:
                help = "what `carry` computes does not fold" if name in self.carried else did_you_mean(name, rows)
                self.collector.error("E061", f"the rule has no row `{shown(name)}`", span=key.span, help=help)
        if not node.entries:
            self.collector.error("E062", "an empty mapping expects nothing", span=node.span, help="name a row")

    def _trained(self, node: MappingNode, count: int, given: Mapping[str, Scalar]) -> list[int | None]:
        env = {name: hyper.value for name, hyper in self.values.items()} | dict(given)
        once = not isinstance(node.get("trained"), SequenceNode)
        found: list[int | None] = []
        for item in self._each(node, "trained", count):
            found.append(found[0] if once and found else self._number(item, env))
        return found

    def _number(self, node: Node | None, env: Mapping[str, Scalar]) -> int | None:
        reader = Reader(self.collector)
        expr = reader.expr(node, "static")
        reader.names(expr, Scope(self.row_reader.declared))
        if expr is None or not name_nodes(expr).keys() <= env.keys():
            return None
        try:
            number = evaluate_static(expr, env)
        except PeftcError as error:
            self.collector.extend(error.diagnostics)
            return None
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            help = "divide with `//` for a whole number"
            self.collector.error("E009", f"`trained` is {number}, not a count", span=expr.span, help=help)
            return None
        return number

    def _same_as(self, node: Node | None) -> SameAs | None:
        if not isinstance(node, MappingNode):
            name = word(node)
            return None if name is None else SameAs(name)
        name, given, names = word(node.get("rule")), node.get("hyper"), node.get("map")
        if name is None:
            return None
        hyper = {key: value(item) for key, (_, item) in given.entries.items()} if isinstance(given, MappingNode) else {}
        pairs = {key: word(item) for key, (_, item) in names.entries.items()} if isinstance(names, MappingNode) else {}
        return SameAs(name, hyper, {key: theirs for key, theirs in pairs.items() if theirs is not None})


def _spans(node: MappingNode) -> dict[str, Span]:
    """The place of each value, and of `sites` and `fold` by row."""
    found = {name: item.span for name, (_, item) in node.entries.items()}
    for name in ("sites", "fold"):
        found |= _rows_of(name, node.get(name))
    same = node.get("same_as")
    if isinstance(same, MappingNode):
        found |= {f"same_as.{name}": item.span for name, (_, item) in same.entries.items()}
    return found


def _spans_of(node: MappingNode, position: int) -> dict[str, Span]:
    """The places of what a list says of one family."""
    found: dict[str, Span] = {}
    for name, (_, item) in node.entries.items():
        if isinstance(item, SequenceNode) and name != "family" and position < len(item.items):
            found[name] = item.items[position].span
            found |= _rows_of(name, item.items[position])
    return found


def _rows_of(name: str, node: Node | None) -> dict[str, Span]:
    entries = node.entries if isinstance(node, MappingNode) else {}
    return {f"{name}.{row}": item.span for row, (_, item) in entries.items()}


def place_of_tests(text: str, tree: MappingNode) -> tuple[int, int] | None:
    """Where `tests:` stands in `text`, when it is whole lines that no other part refers to.

    A rule with other values set is stored without its tests, which speak of the rule as it is written.
    """
    keys = sorted(key.start for key, _ in tree.entries.values())
    if "tests" not in tree.entries:
        return None
    start = tree.key("tests").start
    end = next((other for other in keys if other > start), len(text))
    lines = all(other == 0 or text[other - 1] == "\n" for other in keys)
    return (start, end) if lines and "&" not in text[start:end] else None
