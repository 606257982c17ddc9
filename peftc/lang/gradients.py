"""Which parameters of a row no gradient can reach, told from the expressions alone.

    E024 error: no gradient reaches `v`: `sign` lets none through
      --> mine.yaml:5:41
       |
    5  |   a: {at: ffn, modify: out, form: sign(v) * x, params: {v: {shape: [d_in], init: ones}}}
       |                                   ^^^^

A name is *live* in an expression when a gradient of the value flows to it; both branches of a condition count, so what
is told here is so at every site. The verifier asks the same of the graph, once there is one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from peftc.diagnostics import Diagnostic
from peftc.lang.expr import name_nodes
from peftc.lang.rule import Delta, Expr, Scalar

_NONE = frozenset({"detach", "sign", "floor", "round", "greater", "less"})
"""Ops whose gradient is zero wherever there is one."""
_SOME = {"gather": (0,), "scatter": (0,), "place": (0,), "where": (1, 2), "dropout": (0,)}
"""Ops that let a gradient through to some operands; all others let it through to all."""

Live = frozenset[str]
_NOTHING: Live = frozenset()


def check_gradients(delta: Delta, words: Mapping[str, Scalar]) -> list[Diagnostic]:
    """E024 for each trainable parameter that is read, and that no gradient reaches; `words` may be called as ops."""
    wanted = {p.name: p for p in (*delta.form.params, *delta.params) if not p.frozen}
    known = {name: None if isinstance(value, Expr) else value for name, value in delta.arguments.items()}
    given = {**delta.form.args, **words, **known}
    exprs = _expressions(delta)
    env: dict[str, Live] = {name: frozenset({name}) for name in wanted}
    for name, expr in exprs:
        value = _live(expr.tree, env, given)
        env[name] = value | env.get("dh", _NOTHING) if name == "dh" else value
    final = env.get("", env.get("dh", _NOTHING))
    read = set().union(*(name_nodes(expr) for _, expr in exprs))
    return [_told(delta, name, exprs, given) for name in wanted if name in read and name not in final]


def _expressions(delta: Delta) -> list[tuple[str, Expr]]:
    """Every expression in the order of the graph, each with the name of its value; the last is "", the new h."""
    form, found = delta.form, list(delta.form.let.items())
    if delta.value is not None:
        return [*delta.let.items(), ("", delta.value)]
    if form.dh is not None:
        found.append(("dh", form.dh))
    if form.attend is not None:
        found += [("dh", form.attend.keys), ("dh", form.attend.values)]
    found += delta.let.items()
    word = isinstance(delta.compose.tree, ast.Name) and delta.compose.text in ("add", "gate", "prepend")
    return found if word else [*found, ("", delta.compose)]


def _live(node: ast.AST, env: Mapping[str, Live], words: Mapping[str, Scalar]) -> Live:
    match node:
        case ast.Name(id=name):
            return env.get(name, _NOTHING)
        case ast.Call(func=ast.Name(id=name), args=args):
            reached = _reached(_op(name, words), args)
            return _NOTHING.union(*(_live(argument, env, words) for argument in reached))
        case ast.IfExp(body=body, orelse=orelse):
            return _live(body, env, words) | _live(orelse, env, words)
        case ast.Compare() | ast.Constant():
            return _NOTHING
        case ast.Subscript(value=value):
            return _live(value, env, words)
    return _NOTHING.union(*(_live(child, env, words) for child in ast.iter_child_nodes(node)))


def _op(name: str, words: Mapping[str, Scalar]) -> str:
    word = words.get(name, name)
    return word if isinstance(word, str) else ""


def _reached(op: str, args: Sequence[ast.expr]) -> list[ast.expr]:
    if op in _NONE:
        return []
    return [arg for place, arg in enumerate(args) if place in _SOME[op]] if op in _SOME else list(args)


def _told(delta: Delta, name: str, exprs: list[tuple[str, Expr]], words: Mapping[str, Scalar]) -> Diagnostic:
    """At the call that lets no gradient through, where that is in the row's own file."""
    carriers, stops = {name}, list[tuple[Expr, ast.Call]]()
    for bound, expr in exprs:
        if carriers & name_nodes(expr).keys():
            carriers.add(bound)
            stops += ((expr, call) for call in _stops(expr, carriers, words))
    help = f"let `{name}` act where a gradient flows, or mark it `frozen: true`"
    own = delta.span.file if delta.span else ""
    spans = [(_op(ast.unparse(call.func), words), expr.span_of(call.func)) for expr, call in stops]
    here = [(op, span) for op, span in spans if span is not None and span.file == own]
    if not spans:
        return Diagnostic("E024", f"no gradient reaches `{name}`: the new value does not read it", delta.span, help)
    op, span = (here or [(op, delta.span_at("form")) for op, _ in spans])[0]
    return Diagnostic("E024", f"no gradient reaches `{name}`: `{op}` lets none through", span, help)


def _stops(expr: Expr, carriers: set[str], words: Mapping[str, Scalar]) -> Iterator[ast.Call]:
    """The calls of `expr` that read one of `carriers` and let no gradient through to it."""
    for call in ast.walk(expr.tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        kept = _reached(_op(call.func.id, words), call.args)
        lost = [argument for argument in call.args if argument not in kept]
        if any(isinstance(n, ast.Name) and n.id in carriers for argument in lost for n in ast.walk(argument)):
            yield call
