"""Forms: reads a functional form dh = f(x) from its file or from a row, and says what it needs from a rule.

A form of the library is written once for all rules, so a name it does not define itself (`r`, `l`) is a *need*:
the rule that uses it must give that name as a hyperparameter, under `with:`, or as a tap of the site.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from peftc.diagnostics import Collector, Span, fail
from peftc.lang.expr import name_nodes
from peftc.lang.inits import FROZEN, check_init_names
from peftc.lang.ops import INITS
from peftc.lang.reading import Reader, Scope, form_scope, value, word
from peftc.lang.rule import Attend, Expr, Form, Param, Scalar
from peftc.lang.schema import FormFile, check
from peftc.lang.shapes.check import check_form
from peftc.lang.sites import DIMS, TAPS
from peftc.lang.source import compose
from peftc.lang.tree import MappingNode, ScalarNode


def parse_form(text: str, file: str) -> Form:
    """The form a file holds. Raises `PeftcError` with every mistake of the file."""
    collector = Collector()
    tree = compose(text, file, collector)
    if not isinstance(tree, MappingNode):
        fail("E009", f"{file} must be a mapping of `key: value`", span=tree.span)
    check_version(tree, "peftc-form", "form")
    tree = check(tree, FormFile, collector)
    form = form_of(tree, word(tree.get("name")) or "", file, collector)
    collector.raise_if_errors()
    return form


def form_of(tree: MappingNode, name: str, file: str, collector: Collector) -> Form:
    """The form that the body `tree` of a file holds, its shapes checked where nothing else is wrong."""
    arguments, before = _arguments(tree), len(collector.errors)
    scope = form_scope(arguments, _names(tree, "params"), loose=True)
    form = read_form(tree, Reader(collector, arguments), scope, name=name, file=file, key="dh")
    if len(collector.errors) == before:
        collector.extend(check_form(form, needs(form).keys() - TAPS))
    return form


_FORM_HEADER = re.compile(r"^['\"]?peftc-form['\"]?\s*:", re.MULTILINE)


def is_form(text: str) -> bool:
    """Whether a file is a form and not a rule, by its header; it need not be right otherwise."""
    return _FORM_HEADER.search(text) is not None


def check_version(tree: MappingNode, key: str, what: str) -> None:
    """Raise E019 when the header is of another kind of file or of a version this peftc does not read."""
    node = tree.get(key)
    if node is None:
        for other, kind in (("peftc", "rule"), ("peftc-form", "form"), ("peftc-pattern", "pattern")):
            if other != key and other in tree.entries:
                help = f"a {what} starts with `{key}: 1`"
                fail("E019", f"this is a {kind} file, not a {what}", span=tree.key(other).span, help=help)
    elif value(node) != 1 or isinstance(value(node), bool):
        shown = f"`{node.text}`" if isinstance(node, ScalarNode) else "this"
        fail("E019", f"{shown} is not a format version of a {what}", span=node.span, help="this peftc reads version 1")


def read_form(
    node: MappingNode,
    reader: Reader,
    scope: Scope,
    *,
    name: str,
    file: str,
    key: str,
    taken: Mapping[str, str] | None = None,
) -> Form:
    """The form that `node` holds, its expression under `key` (`dh` in a file, `expr` in a row)."""
    described = reader.fresh(node.get("args"), "an argument of the form", {})
    described = reader.fresh(node.get("params"), "a parameter of the form", {**(taken or {}), **described})
    reader.fresh(node.get("let"), "a `let` of the form", described)
    params = reader.params(node.get("params"), scope)
    static = scope
    lets, scope = reader.lets(node.get("let"), scope)
    check_init_names(reader, params, lets, static)
    dh, attend = reader.expr(node.get(key)), None
    reader.names(dh, scope)
    rows = node.get("attend")
    if isinstance(rows, MappingNode):
        keys, values = reader.expr(rows.get("keys")), reader.expr(rows.get("values"))
        reader.names(keys, scope)
        reader.names(values, scope)
        attend = Attend(keys, values) if keys and values else None
    _one_of(node, key, reader.collector)
    return Form(
        name,
        params,
        _arguments(node),
        lets,
        dh,
        attend,
        word(node.get("doc")) or "",
        word(node.get("paper")) or "",
        file,
    )


def _one_of(node: MappingNode, key: str, collector: Collector) -> None:
    if key in node.entries and "attend" in node.entries:
        later = max(node.key(key), node.key("attend"), key=lambda found: found.start)
        message = f"a form has `{key}` or `attend`, not both"
        collector.error("E003", message, span=later.span, help="take one of them out")
    elif key not in node.entries and "attend" not in node.entries:
        message = f"missing key `{key}` (or `attend`) of the form"
        help = f"`{key}` says what the form computes: {key}: linear(x, W)"
        collector.error("E010", message, span=first_token(node), help=help)


def first_token(node: MappingNode) -> Span:
    """The place of a mapping's first key, or of the mapping when it is empty."""
    for key, _ in node.entries.values():
        return key.span
    return node.span


def _arguments(node: MappingNode) -> dict[str, Scalar]:
    args = node.get("args")
    return {name: value(item) for name, (_, item) in args.entries.items()} if isinstance(args, MappingNode) else {}


def _names(node: MappingNode, key: str) -> list[str]:
    found = node.get(key)
    return list(found.entries) if isinstance(found, MappingNode) else []


def expressions(form: Form) -> list[Expr]:
    """Every expression of a form."""
    found = [expr for param in form.params for expr in param_expressions(param)]
    found += [*form.let.values(), *([form.dh] if form.dh else [])]
    return found + ([form.attend.keys, form.attend.values] if form.attend else [])


def param_expressions(param: Param) -> list[Expr]:
    """Shape, init, condition and learning rate of a parameter."""
    return [*param.shape, param.init, *(part for part in (param.condition, param.lr) if part is not None)]


def needs(form: Form) -> dict[str, Expr]:
    """The names that `form` reads and does not define, each with an expression that reads it."""
    own = {param.name for param in form.params} | {*form.args, *form.let, *DIMS, "x", "h"}
    found: dict[str, Expr] = {}
    for expr in expressions(form):
        for name in name_nodes(expr):
            of_init = name in (*INITS, *FROZEN) and any(expr is param.init for param in form.params)
            if name not in own and not of_init:
                found.setdefault(name, expr)
    return found
