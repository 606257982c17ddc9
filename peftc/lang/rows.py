"""Delta rows: reads one row of the table `deltas:` and checks what its words mean.

A row is read against its sites: every tap in `modify` and `insert` must be one that each site in `at` has, and
every name in an expression must be a hyperparameter, a form argument, a parameter, a `let`, a dimension or a tap.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from peftc.diagnostics import Collector, PeftcError, Span, did_you_mean
from peftc.lang.complaints import shown
from peftc.lang.expr import name_nodes
from peftc.lang.forms import param_expressions, read_form
from peftc.lang.inits import check_init_names, check_weights, places_of
from peftc.lang.kinds import Kinds
from peftc.lang.layers import selector
from peftc.lang.library import catalogue, form_names, load_form
from peftc.lang.reading import Reader, Scope, form_scope, value, word, words
from peftc.lang.references import read_sources
from peftc.lang.rule import Delta, Expr, Form, Hyper, Param, Reference, Scalar, Where
from peftc.lang.sites import COMPOSITIONS, DIMS, INSERTIONS
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode
from peftc.lang.uses import FormUse, check_composition

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(slots=True)
class RowReader:
    """Reads rows of one rule file."""

    file: str
    hypers: Mapping[str, Hyper]
    declared: frozenset[str]
    """Names under `hyper:`, those with a wrong value too."""
    collector: Collector
    kinds: Kinds = field(default_factory=Kinds)
    written: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Each row's names under `params:`, those with a wrong value too."""
    forms: Mapping[str, Form | None] = field(default_factory=dict)
    """The rule's own forms; None for one whose own mistakes are told."""
    sound: set[str] = field(default_factory=set)
    """Names of the rows that were read without a mistake."""
    carried: frozenset[str] = frozenset()
    """The names of the entries of `carry`."""

    def row(self, key: ScalarNode, node: MappingNode) -> Delta | None:
        """The delta of one row; None after an error that leaves no delta."""
        at, taps = self._sites(node), self._taps(node)
        arguments = self._arguments(node)
        form = self._form(node, arguments, self.written.get(key.text, frozenset()))
        reader = self._reader({**(form.args if form else {}), **values_of(arguments)})
        scope = self._scope(node, form, arguments)
        taken = dict.fromkeys(self.declared, "a hyperparameter")
        taken |= {param.name: "a parameter of the form" for param in form.params} if form else {}
        taken = self._source_names(node, reader, taken)
        taken = reader.fresh(node.get("params"), "a parameter of the row", taken)
        reader.fresh(node.get("let"), "a `let` of the row", taken)
        params = reader.params(node.get("params"), scope)
        plain = scope
        lets, scope = reader.lets(node.get("let"), scope.with_tensors("dh", *(form.let if form else ())))
        above = {**dict.fromkeys(param.name for param in form.params), **form.let} if form else {}
        check_init_names(reader, params, {**(form.let if form else {}), **lets}, plain, above)
        compose = self._compose(node, reader, scope, lets, key)
        where = self.where(node.get("where"), self.kinds.common_dims(node))
        insert, sources = self._insert(node), self._sources(node)
        if form is None or compose is None:
            return None
        use = FormUse(node, form, arguments, self.hypers, self._names(node), self.collector, self.kinds.of(node))
        use.check({*keys_in(node, "params"), *keys_in(node, "from")}, _read_by_row(params, lets, compose))
        delta = Delta(
            key.text,
            at,
            taps,
            insert,
            form,
            compose,
            arguments,
            where,
            params,
            lets,
            word(node.get("lower")),
            whole(node.get("expect")),
            key.span,
            spans_of(node),
            sources=sources,
            optional=_optional(node),
        )
        check_composition(delta, self.collector)
        return self.started(delta, {*self.declared, *arguments, *form.args})

    def started(self, delta: Delta, static: Collection[str]) -> Delta:
        """The delta with the places its starts read from, once what they read has been checked."""
        check_weights(delta, static, self.collector)
        places = places_of(delta, self.hypers, self.collector)
        return replace(delta, places=places) if places else delta

    def _reader(self, given: Mapping[str, Scalar]) -> Reader:
        return Reader(self.collector, {**given, **{name: hyper.value for name, hyper in self.hypers.items()}})

    def _names(self, node: MappingNode) -> frozenset[str]:
        """Hyperparameters, and the dimensions of the row's own kinds of sites."""
        return self.declared | self.kinds.common_dims(node)

    def _scope(self, node: MappingNode, form: Form | None, arguments: Mapping[str, object]) -> Scope:
        static = {*self._names(node), *arguments, *(form.args if form else ())}
        params = {*(param.name for param in form.params)} if form else set[str]()
        tensors = params | {*keys_in(node, "params"), *keys_in(node, "from")}
        return form_scope(static, tensors, self.kinds.common_taps(node), loose=form is None)

    def _source_names(self, node: MappingNode, reader: Reader, taken: Mapping[str, str]) -> dict[str, str]:
        """E023 for each name under `from:` that means something else; all names, described."""
        taps = dict.fromkeys(self.kinds.common_taps(node), "a tap of the site")
        reader.fresh(node.get("from"), "a name under `from`", {**taps, **taken})
        return {**taken, **dict.fromkeys(keys_in(node, "from"), "a name under `from`")}

    def _sources(self, node: MappingNode) -> dict[str, Reference]:
        """The references under `from:`; E024 where both a single one and `insert` say what x is."""
        if isinstance(node.get("from"), ScalarNode) and "insert" in node.entries:
            message, help = "`from` says what x is, and so does `insert`", "take one of them out"
            self.collector.error("E024", message, span=node.key("insert").span, help=help)
        found = read_sources(node.get("from"), self.declared, self.collector, self.kinds, self.carried)
        single = found.get("x") if isinstance(node.get("from"), ScalarNode) else None
        value = next((choice for choice in single.choices if not choice.tap), None) if single is not None else None
        if value is not None:
            message = f"`{value.kind}` is a carried value, which cannot be x: its width is not that of a tap"
            help = f"give it a name, as in from: {{z: {shown(value.text)}}}"
            self.collector.error("E024", message, span=value.span, help=help)
        return found

    def _sites(self, node: MappingNode) -> tuple[str, ...]:
        found = words(node.get("at"))
        for item in found:
            if not self.kinds.is_known(item.text):
                message = f"unknown site `{shown(item.text)}`"
                help = did_you_mean(item.text, self.kinds.names)
                self.collector.error("E005", message, span=item.span, help=help)
        self._distinct(node.get("at"), found, "a site")
        return tuple(self.kinds.of(node))

    def _taps(self, node: MappingNode) -> tuple[str, ...]:
        """The taps of `modify`; a `?` at the end of one says that some sites may lack it."""
        found = [without_mark(item) for item in words(node.get("modify"))]
        for item in found:
            self._tap(node, item, ())
        self._distinct(node.get("modify"), found, "a tap")
        return tuple(item.text for item in found)

    def _insert(self, node: MappingNode) -> str:
        given = node.get("insert")
        if isinstance(given, ScalarNode) and given.text not in INSERTIONS:
            self._tap(node, given, INSERTIONS)
        return word(given) or "parallel"

    def _tap(self, node: MappingNode, item: ScalarNode, also: tuple[str, ...]) -> None:
        for site in words(node.get("at")):
            taps = self.kinds.taps(site.text)
            if taps is not None and item.text not in taps:
                article = "an" if site.text[0] in "aeiou" or site.text == "ffn" else "a"
                message = f"unknown tap `{shown(item.text)}` of {article} {site.text} site"
                self.collector.error("E004", message, span=item.span, help=did_you_mean(item.text, (*taps, *also)))
                return

    def _distinct(self, node: Node | None, found: list[ScalarNode], what: str) -> None:
        help = "a word, or a list of at least one"
        if isinstance(node, SequenceNode) and not node.items:
            self.collector.error("E009", f"an empty list, where {what} is expected", span=node.span, help=help)
        seen: set[str] = set()
        for item in found:
            if item.text in seen:
                self.collector.error(
                    "E023", f"`{shown(item.text)}` is named twice", span=item.span, help="name it once"
                )
            seen.add(item.text)

    def _arguments(self, node: MappingNode) -> dict[str, Scalar | Expr]:
        """The row's `with:`; a word stays a word unless it names a hyperparameter or a dimension."""
        found: dict[str, Scalar | Expr] = {}
        given, reader = node.get("with"), Reader(self.collector)
        scope = Scope(frozenset({*self._names(node), *DIMS}))
        for name, (_, item) in given.entries.items() if isinstance(given, MappingNode) else ():
            text = word(item)
            if text is None or (_BARE.fullmatch(text) and text not in scope.static):
                found[name] = value(item)
                continue
            expr = reader.expr(item, "static")
            reader.names(expr, scope)
            if expr is not None:
                found[name] = expr
        return found

    def _form(self, node: MappingNode, arguments: Mapping[str, Scalar | Expr], written: frozenset[str]) -> Form | None:
        given = node.get("form")
        if isinstance(given, MappingNode):
            return self._inline(node, given, arguments)
        name = word(given)
        if not isinstance(given, ScalarNode):
            return None
        tensors = [*keys_in(node, "params"), *keys_in(node, "from")]
        if name is None or not _BARE.fullmatch(name) or name in tensors:
            reader = self._reader(values_of(arguments))
            scope = form_scope({*self._names(node), *arguments}, tensors, self.kinds.common_taps(node))
            dh = reader.expr(given)
            reader.names(dh, scope)
            return Form("", dh=dh, file=self.file) if dh else None
        if name in written:
            return None  # a parameter whose own mistake is told
        if name in self.forms:
            return self.forms[name]
        clash = catalogue("forms").clash(name, "form")
        if clash is not None:
            self.collector.error(clash.code, clash.message, span=given.span, help=clash.help)
            return None
        if name not in form_names():
            known = [*self.forms, *form_names()]
            tensor = name in {"x", "h", *self.kinds.common_taps(node), *keys_in(node, "let")}
            help = f"as an expression: identity({name})" if tensor else did_you_mean(name, known)
            self.collector.error("E006", f"unknown form `{shown(name)}`", span=given.span, help=help)
            self.collector.extend_once(catalogue("forms").problems)
            return None
        try:
            return load_form(name)
        except PeftcError as error:
            self.collector.extend(error.diagnostics)
            return None

    def _inline(self, node: MappingNode, given: MappingNode, arguments: Mapping[str, Scalar | Expr]) -> Form:
        args = {name: value(item) for name, item in _items(given, "args")}
        reader = self._reader({**args, **values_of(arguments)})
        params = [*keys_in(node, "params"), *keys_in(given, "params"), *keys_in(node, "from")]
        scope = form_scope({*self._names(node), *arguments, *args}, params, self.kinds.common_taps(node))
        taken = dict.fromkeys(self.declared - args.keys(), "a hyperparameter")
        return read_form(given, reader, scope, name="", file=self.file, key="expr", taken=taken)

    def _compose(
        self, node: MappingNode, reader: Reader, scope: Scope, lets: Mapping[str, Expr], key: ScalarNode
    ) -> Expr | None:
        given = node.get("compose")
        if given is None:
            form = node.get("form")
            span = form.span if isinstance(form, ScalarNode) else key.span
            return Expr("h + dh", ast.parse("h + dh", mode="eval").body, span, exact=False)
        expr = reader.expr(given)
        if expr is None or expr.text in COMPOSITIONS:
            return expr
        if isinstance(expr.tree, ast.Name) and expr.text not in scope.static | scope.tensors:
            help = did_you_mean(expr.text, COMPOSITIONS)
            self.collector.error("E008", f"unknown composition `{shown(expr.text)}`", span=expr.span, help=help)
            return expr
        reader.names(expr, scope)
        if all("dh" not in name_nodes(part) for part in (expr, *lets.values())):
            self.collector.error("E024", "`compose` does not use `dh`", span=expr.span, help="write `h + dh`, say")
        return expr

    def where(self, node: Node | None, dims: frozenset[str] = frozenset()) -> Where:
        """What `where`, or `not` of a test, says; `dims` are names of dimensions beside those of all sites."""
        if not isinstance(node, MappingNode):
            return Where()
        reader = Reader(self.collector)
        condition = reader.expr(node.get("if"), "static")
        reader.names(condition, Scope(frozenset({*self.declared, *dims, *DIMS})))
        strings = {key: tuple(item.text for item in words(node.get(key))) for key in ("stack", "kind", "role", "path")}
        spans = {name: item.span for name, (_, item) in node.entries.items()}
        return Where(self._layers(node.get("layers")), **strings, condition=condition, spans=spans)

    def _layers(self, node: Node | None) -> tuple[int, ...] | str | None:
        if isinstance(node, SequenceNode):
            return tuple(layer for item in node.items if (layer := whole(item)) is not None)
        text = word(node)
        if text is None:
            layer = whole(node)
            return None if layer is None else (layer,)
        layers = selector(text)
        if layers is None and node is not None:
            self.collector.error("E009", f"`{text}` names no layer", span=node.span, help="as in 0-5, or first 4")
        return layers


def without_mark(tap: ScalarNode) -> ScalarNode:
    """The name of a tap as it is written, less the `?` of one that a site may lack."""
    name = tap.text.removesuffix("?")
    return tap if name == tap.text else ScalarNode(name, name, tap.span, tap.start, tap.end, tap.exact)


def _optional(node: MappingNode) -> frozenset[str]:
    return frozenset(item.text.removesuffix("?") for item in words(node.get("modify")) if item.text.endswith("?"))


def _read_by_row(params: tuple[Param, ...], lets: Mapping[str, Expr], compose: Expr) -> set[str]:
    exprs = [expr for param in params for expr in param_expressions(param)]
    return {name for expr in (*exprs, *lets.values(), compose) for name in name_nodes(expr)}


def values_of(arguments: Mapping[str, Scalar | Expr]) -> dict[str, Scalar]:
    return {name: given for name, given in arguments.items() if not isinstance(given, Expr)}


def _items(node: MappingNode, key: str) -> list[tuple[str, Node]]:
    found = node.get(key)
    return [(name, item) for name, (_, item) in found.entries.items()] if isinstance(found, MappingNode) else []


def keys_in(node: MappingNode, key: str) -> list[str]:
    return [name for name, _ in _items(node, key)]


def whole(node: Node | None) -> int | None:
    found = value(node)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def spans_of(node: MappingNode) -> dict[str, Span]:
    """The place of each value of a row; those under `with:` as `with.<name>`."""
    found = {name: item.span for name, (_, item) in node.entries.items()}
    return found | {f"with.{name}": item.span for name, item in _items(node, "with")}
