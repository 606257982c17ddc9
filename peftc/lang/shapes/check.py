"""Checks the shapes of a row at every site and tap it names, and of a form by itself.

    E013 error: `linear(x, W_down)` cannot fit: x is [.., d_in] but W_down is [d_in, r]
      --> mine.yaml:8:23
       = help: transpose it? `W_down.T` fits: `linear` takes W as [out, in]

A form of the library is checked by itself when it is read, and again in each row, in the row's terms: there `r` is
what the row's `with:` says.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import replace

from peftc.diagnostics import Diagnostic, Span
from peftc.lang.expr import name_nodes
from peftc.lang.rule import Delta, Expr, Form, Hyper, Param, Scalar
from peftc.lang.shapes.places import Place, places
from peftc.lang.shapes.polynomial import Polynomial, constant, symbol
from peftc.lang.shapes.terms import UNKNOWN, Absent, Misfit, Shape, Sizes, Static, Value
from peftc.lang.shapes.walk import Walk, number
from peftc.lang.sites import DIMS


def check_row(delta: Delta, hypers: Mapping[str, Hyper]) -> list[Diagnostic]:
    """The errors (E013) and warnings (W006) about the row's shapes, each told once, for the first place it is at."""
    found: dict[tuple[str, object], Diagnostic] = {}
    for place in places(delta):
        for diagnostic in _at(delta, hypers, place):
            found.setdefault((diagnostic.code, diagnostic.span), diagnostic)
    return list(found.values())


def check_form(form: Form, needs: Iterable[str]) -> list[Diagnostic]:
    """The errors of a form wherever it is used; `needs` are sizes it leaves to the rule."""
    env: dict[str, Value] = {name: Static(symbol(name)) for name in (*DIMS, *needs)}
    env |= {"x": Shape((symbol("d_in"),), open=True), "h": UNKNOWN}
    values = _hypers(env, form.args)
    walk = Walk(Sizes(values, {}, frozenset(DIMS) - form.args.keys()), env)
    _form(walk, form, ())
    return [diagnostic for diagnostic in walk.found if diagnostic.severity == "error"]


def row_walk(delta: Delta, hypers: Mapping[str, Hyper], place: Place) -> Walk:
    """What the names of a row's expressions are at one place: dimensions, numbers, parameters, taps, x and h."""
    env: dict[str, Value] = {**place.taps, **{name: Static(symbol(name)) for name in DIMS}, "has_bias": Static()}
    args = {name: value for name, value in delta.form.args.items() if name not in hypers}
    values = _hypers(env, {**args, **{name: h.value for name, h in hypers.items() if not _open(h)}})
    env |= {name: _unknown(hyper.value, name) for name, hyper in hypers.items() if _open(hyper)}
    related = name_nodes(delta.where.condition) if delta.where.condition else {}
    dims = frozenset(DIMS) - args.keys() - hypers.keys()
    walk = Walk(Sizes(values, place.aliases, dims, frozenset(related)), env)
    for name, given in delta.arguments.items():
        value = walk.value(given) if isinstance(given, Expr) else number(given)
        walk.env[name] = value if isinstance(value, Static | list) else Static()
    _params(walk, (*delta.form.params, *delta.params))
    walk.env["h"] = place.h
    if place.x is not None:
        walk.env["x"] = place.x
    return walk


def walk_body(walk: Walk, delta: Delta) -> list[Diagnostic]:
    """Walks form and `let` of a row, and enters dh; what is wrong inside the form, which `walk.found` then lacks."""
    walk.env["dh"] = _body(walk, delta.form)
    inside, walk.found = walk.found, []
    for name, expr in delta.let.items():
        walk.env[name] = walk.value(expr)
    return inside


def _hypers(env: dict[str, Value], given: Mapping[str, Scalar]) -> dict[str, Polynomial]:
    """Enters numbers and words that have a name; the whole numbers among them."""
    for name, value in given.items():
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        static = Static(symbol(name) if numeric else None, value, known=True)
        env[name] = number(value) if isinstance(value, tuple) else static
    return {name: constant(value) for name, value in given.items() if type(value) is int and abs(value) < 2**63}


def _open(hyper: Hyper) -> bool:
    """Whether the value is not one number: it differs between layers, or a budget is still to be solved."""
    return bool(hyper.layers) or hyper.budget is not None


def _unknown(value: Scalar, name: str) -> Static:
    return Static(symbol(name)) if type(value) in (int, float) else Static()


def _params(walk: Walk, params: Iterable[Param]) -> None:
    """Enters the parameters; an absent one is None, as in the graph."""
    found: dict[str, Value] = {}
    for param in params:
        given = walk.value(param.condition) if param.condition else None
        if param.condition is not None and isinstance(given, Static) and given.known and not given.value:
            found[param.name] = Absent(param.condition.text)
        else:
            sizes = [walk.value(size) for size in param.shape]
            found[param.name] = Shape(tuple(size.size if isinstance(size, Static) else None for size in sizes))
    walk.env |= found


def _form(walk: Walk, form: Form, params: Iterable[Param]) -> Value:
    """Walks a form; what dh is."""
    _params(walk, (*form.params, *params))
    return _body(walk, form)


def _body(walk: Walk, form: Form) -> Value:
    for name, expr in form.let.items():
        walk.env[name] = walk.value(expr)
    if form.attend is not None:
        for word, expr in (("keys", form.attend.keys), ("values", form.attend.values)):
            _check_prefix(walk, word, expr, walk.value(expr))
        return UNKNOWN
    return walk.value(form.dh) if form.dh is not None else UNKNOWN


def _check_prefix(walk: Walk, word: str, expr: Expr, value: Value) -> None:
    if not isinstance(value, Shape) or value.open:
        return
    heads, width = value.last(2)
    name = "key_dim" if word == "keys" else "head_dim"
    fits = len(value.sizes) in (3, 4) and walk.sizes.verdict(width, symbol(name)) != "never"
    if not fits or _apart(walk.sizes, heads):
        help = f"it must be [l, kv_heads, {name}], or [B, l, kv_heads, {name}]"
        message = f"`{word}` of `attend` is {value}, which are no {word} of an attention"
        walk.found.append(Diagnostic("E013", message, expr.span, help))


def _apart(sizes: Sizes, heads: Polynomial | None) -> bool:
    return all(sizes.verdict(heads, symbol(name)) in ("never", "coincidence") for name in ("kv_heads", "heads"))


def _at(delta: Delta, hypers: Mapping[str, Hyper], place: Place) -> list[Diagnostic]:
    """What is wrong at one place."""
    walk = row_walk(delta, hypers, place)
    inside = _for_row(delta, walk_body(walk, delta))
    _check_composition(walk, delta, place, walk.env["dh"])
    return inside + walk.found


def _for_row(delta: Delta, found: list[Diagnostic]) -> list[Diagnostic]:
    """Mistakes inside a form of another file told at the row that uses it, for there it can be mended."""
    if not delta.form.name or delta.span is None:
        return found
    span, own = delta.span_at("form"), delta.span.file
    return [
        replace(d, span=span, message=f"form `{delta.form.name}`: {d.message}")
        if d.span is None or d.span.file != own
        else d
        for d in found
    ]


def _check_composition(walk: Walk, delta: Delta, place: Place, dh: Value) -> None:
    """The composed value must have the shape of h."""
    word = delta.compose.tree.id if isinstance(delta.compose.tree, ast.Name) else ""
    if word == "gate" or (delta.form.attend is not None and word == "add"):
        return
    if word == "prepend":
        _match(walk, delta, place, dh, Shape((symbol("d_out"),), open=True))
        return
    before = len(walk.found)
    written = "compose" in delta.spans and word != "add"
    result = walk.value(delta.compose if written else replace(_SUM, span=_span(delta)))
    if len(walk.found) == before:
        _match(walk, delta, place, result, place.h)


def _match(walk: Walk, delta: Delta, place: Place, result: Value, wanted: Shape) -> None:
    """E013 where `result` cannot have the shape `wanted`."""
    span = _span(delta)
    if not isinstance(result, Shape):
        return
    short = len(result.sizes) < len(wanted.sizes) and not result.open
    long = len(result.sizes) > len(wanted.sizes) and not wanted.open
    count = min(len(result.sizes), len(wanted.sizes))
    reason = "they differ in their number of axes" if short or long else None
    walk.sizes.chances.clear()
    try:
        for one, other in zip(result.last(count), wanted.last(count), strict=True):
            walk.sizes.same(one, other)
    except Misfit as misfit:
        reason = reason or misfit.reason
    walk.warn(delta.compose.text, span)
    if reason is not None:
        article = "an" if place.site in ("attention", "ffn", "embedding") else "a"
        told = f"the new value is {result}, but `{place.tap}` of {article} {place.site} is {wanted}"
        walk.found.append(Diagnostic("E013", told, span, _why(walk, result, reason)))


def _span(delta: Delta) -> Span | None:
    return delta.span_at("compose" if "compose" in delta.spans else "form")


def _why(walk: Walk, result: Shape, reason: str) -> str:
    dh = walk.env.get("dh")
    return f"{reason}; dh is {dh}" if isinstance(dh, Shape) and dh != result else reason


_SUM = Expr("h + dh", ast.parse("h + dh", mode="eval").body, exact=False)
