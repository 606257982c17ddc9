"""Entries of `rewrite:`: several taps of a site, replaced at once.

    rewrite:
      exchange: {at: attention, set: {q: k, k: q}}
      skip:     {at: block, where: {layers: [3]}, set: {out: x}}

Every expression reads the taps as they were: neither of the two above sees what the other has put in place. `h` is
the tap that an expression replaces, so that one of the name of a dimension (`heads`) can be read as well. A tap that
the site computes after another one of the entry (`out` after `x`) is what the site makes of the new one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from peftc.lang.complaints import shown
from peftc.lang.expr import calls_in, name_nodes
from peftc.lang.forms import param_expressions
from peftc.lang.inits import check_init_names
from peftc.lang.reading import Reader, Scope
from peftc.lang.rows import RowReader, keys_in, spans_of, values_of, whole, without_mark
from peftc.lang.rule import Delta, Expr, Form, Param, Scalar
from peftc.lang.sites import DIMS
from peftc.lang.tree import MappingNode, ScalarNode


@dataclass(frozen=True, slots=True)
class Head:
    """What entries of `rewrite` and of `carry` have in common, and what their expressions are read with."""

    at: tuple[str, ...]
    arguments: dict[str, Scalar | Expr]
    params: tuple[Param, ...]
    lets: dict[str, Expr]
    reader: Reader
    scope: Scope
    static: frozenset[str]


@dataclass(slots=True)
class RewriteReader(RowReader):
    """Reads the entries of `rewrite:` of one rule file."""

    def entry(self, key: ScalarNode, node: MappingNode) -> Delta | None:
        """The entry as a row with `sets`; None after an error that leaves no entry."""
        head = self.head(node)
        sets: dict[str, Expr] = {}
        optional: set[str] = set()
        spans = spans_of(node)
        for name, place, item in self._set(node):
            expr = head.reader.expr(item)
            head.reader.names(expr, head.scope.with_tensors("h"))
            if name in sets:
                message = f"`{name}` is set twice"
                self.collector.error("E023", message, span=place.span, help="set it once")
            if expr is not None:
                sets[name] = expr
            spans[f"set.{name}"] = place.span
            optional |= {name} if place.text.endswith("?") else set()
        self.unread(node, head, sets.values())
        delta = Delta(
            key.text, head.at, tuple(sets), "parallel", Form(""), unchanged(key), head.arguments,
            self.where(node.get("where")), head.params, head.lets, None, whole(node.get("expect")), key.span, spans,
            sources=self._sources(node), sets=sets, optional=frozenset(optional),
        )  # fmt: skip
        return self.started(delta, head.static)

    def head(self, node: MappingNode) -> Head:
        """What an entry says beside what it is for: names that stand for two things are E023 here."""
        at, arguments, taps = self._sites(node), self._arguments(node), self.kinds.common_taps(node)
        reader = self._reader(values_of(arguments))
        taken = {**dict.fromkeys(taps, "a tap of the site"), **dict.fromkeys(self.declared, "a hyperparameter")}
        taken = self._source_names(node, reader, taken)
        taken = reader.fresh(node.get("params"), "a parameter of the entry", taken)
        reader.fresh(node.get("let"), "a `let` of the entry", taken)
        static = frozenset({*self._names(node), *arguments, *DIMS})
        tensors = {*keys_in(node, "params"), *keys_in(node, "from"), *(taps - static)}
        before = Scope(static, frozenset(tensors))
        params = reader.params(node.get("params"), before)
        lets, scope = reader.lets(node.get("let"), before)
        check_init_names(reader, params, lets, before)
        return Head(at, arguments, params, lets, reader, scope, static)

    def unread(self, node: MappingNode, head: Head, own: Iterable[Expr]) -> None:
        """E003 for each name under `with:` that no expression of the entry reads; `own` are those of its purpose."""
        exprs = [*own, *head.lets.values(), *(expr for param in head.params for expr in param_expressions(param))]
        read = {name for expr in exprs for name in (*name_nodes(expr), *calls_in(expr))}
        given = node.get("with")
        for name, (key, _) in given.entries.items() if isinstance(given, MappingNode) else ():
            if name not in read:
                message, help = f"no expression of the entry reads `{shown(name)}`", "take it out, or use it"
                self.collector.error("E003", message, span=key.span, help=help)

    def _set(self, node: MappingNode) -> list[tuple[str, ScalarNode, ScalarNode]]:
        """The taps under `set:` that are taps of every site, with the places of their names, and the expressions."""
        given = node.get("set")
        found: list[tuple[str, ScalarNode, ScalarNode]] = []
        if isinstance(given, MappingNode) and not given.entries:
            message, help = "an empty mapping, where a tap is expected", "as in set: {out: x}"
            self.collector.error("E009", message, span=given.span, help=help)
        for place, item in given.entries.values() if isinstance(given, MappingNode) else ():
            name = place.text.removesuffix("?")
            self._tap(node, without_mark(place), ())
            known = all(name in taps for taps in self.kinds.of(node).values())
            if known and isinstance(item, ScalarNode):
                found.append((name, place, item))
        return found


def unchanged(key: ScalarNode) -> Expr:
    """The composition of an entry, which composes nothing."""
    return Expr("h", ast.Name("h"), key.span, exact=False)
