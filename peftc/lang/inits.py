"""Initial values: what an `init` may read, and where there is a weight for it to read.

An `init` is an expression over static names, the frozen tensors `weight` (the site's weight as [d_out, d_in]) and `h`
(where the row modifies a weight or a bias, that tensor), the parameters above it, `let` names that are made of these,
and random draws in the shape of the parameter: normal(0.02), kaiming_uniform, ...
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping

from peftc.diagnostics import Collector, Span, did_you_mean
from peftc.lang.expr import name_nodes
from peftc.lang.ops import INITS, OPS
from peftc.lang.reading import Reader, Scope, tensors_in_static_places
from peftc.lang.rule import Delta, Expr, Hyper, Param
from peftc.lang.sites import DIMS, WEIGHTS

FROZEN = ("weight", "h")
"""The tensors of the base that an `init` may read."""


def is_draw(node: ast.expr) -> bool:
    """Whether `node` is a start by name: `zeros`, `normal(0.02)`; `zeros([r, 2])` and `eye(r)` are ops."""
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in INITS
        return named and not (node.args and node.func.id in OPS)  # pyright: ignore[reportAttributeAccessIssue]
    return isinstance(node, ast.Name) and node.id in INITS


def init_names(init: Expr, lets: Mapping[str, Expr]) -> dict[str, Expr]:
    """The names that `init` reads, each with the expression that reads it; those of `let` parts too."""
    found: dict[str, Expr] = {}
    queue = [init]
    while queue:
        expr = queue.pop()
        for name in name_nodes(expr):
            if name not in found and not (expr is init and name in INITS):
                found[name] = expr
                queue += [lets[name]] if name in lets else []
    return found


def check_init_names(
    reader: Reader, params: Iterable[Param], lets: Mapping[str, Expr], scope: Scope, above: Collection[str] = ()
) -> None:
    """E007, E008 and E011 for names that the `init` of `params` cannot read; `above` are parameters of the form."""
    params = tuple(params)
    own = {param.name for param in params}
    known = {*above}
    for param in params:
        _check_one(reader, param, lets, scope, known, own - known)
        known.add(param.name)


def _check_one(
    reader: Reader, param: Param, lets: Mapping[str, Expr], scope: Scope, above: set[str], below: set[str]
) -> None:
    collector, tree = reader.collector, param.init.tree
    readable = {*above, *FROZEN, *lets}
    if isinstance(tree, ast.Name) and tree.id not in readable | scope.static | set(INITS) | below:
        help = did_you_mean(tree.id, [*INITS, *above, *FROZEN])
        collector.error("E007", f"unknown init `{tree.id}`", span=param.init.span_of(tree), help=help)
        return
    for name, expr in init_names(param.init, lets).items():
        span = expr.span_of(name_nodes(expr)[name])
        if name in below:
            help = "an `init` sees the parameters above its own: move it down"
            collector.error("E008", f"`{name}` has no value yet when `{param.name}` starts", span=span, help=help)
        elif name in readable | scope.static or (scope.loose and name not in scope.tensors):
            continue
        elif name in scope.tensors or name == "dh":
            message = f"`{name}` is not known when `{param.name}` starts"
            help = "an `init` may read `weight`, `h` where that is a weight, numbers, and parameters above it"
            collector.error("E008", message, span=span, help=help)
        else:
            help = did_you_mean(name, [*above, *FROZEN, *lets, *scope.static]) or ""
            help = help if help.startswith("did") else did_you_mean("", scope.static - {*DIMS}) or ""
            more = "`weight` and the site's dimensions"
            help = help if help.startswith("did") else f"{help}; and {more}" if help else f"known: {more}"
            collector.error("E008", f"unknown name `{name}`", span=span, help=help)
    _check_numbers(collector, param, readable - scope.static)


def _check_numbers(collector: Collector, param: Param, tensors: Collection[str]) -> None:
    """E011 for a tensor where a number must be: in a condition, or given to a random draw."""
    wrong = list(tensors_in_static_places(param.init, tensors))
    for call in ast.walk(param.init.tree):
        if isinstance(call, ast.Call) and is_draw(call):
            inner = [part for argument in call.args for part in ast.walk(argument)]
            wrong += [part for part in inner if isinstance(part, ast.Name) and part.id in tensors]
    for node in wrong:
        message = f"`{node.id}` is a tensor; here only a static value can be"
        help = "static: numbers, hyperparameters, form arguments, dimensions"
        collector.error("E011", message, span=param.init.span_of(node), help=help)


def check_weights(delta: Delta, static: Collection[str], collector: Collector) -> None:
    """E004 where an `init` of the row reads a weight that its place has not, E011 where sites share the parameter.

    `static` are names of numbers, which hide those of tensors.
    """
    params = {param.name: param for param in (*delta.form.params, *delta.params)}
    lets = {**delta.form.let, **delta.let}
    for param in params.values():
        names = init_names(param.init, lets)
        read = names.keys() - lets - set(static)
        frozen = sorted(name for name in read if name in FROZEN and name not in params)
        for name in frozen:
            own = not delta.form.name or param in delta.params
            span = names[name].span_of(name_nodes(names[name])[name]) if own else delta.span_at("form")
            _check_place(delta, param, name, span, collector)
        local = [*frozen, *sorted(name for name in read if name in params and params[name].share == "site")]
        if param.share != "site" and local:
            message = f"`init` of `{param.name}` reads `{local[0]}`, which every site has of its own"
            help = f"`{param.name}` is shared (share: {param.share}); give each site its own, or a random start"
            collector.error("E011", message, span=param.init.span, help=help)


def load_calls(expr: Expr, lets: Mapping[str, Expr]) -> list[tuple[ast.Call, Expr]]:
    """The calls of `load` that `expr` makes, itself or in a `let` it reads, each with the expression it stands in."""
    exprs = [expr, *(lets[name] for name in init_names(expr, lets) if name in lets)]
    calls = [(node, part) for part in exprs for node in ast.walk(part.tree) if isinstance(node, ast.Call)]
    return [(node, part) for node, part in calls if isinstance(node.func, ast.Name) and node.func.id == "load"]


def places_of(delta: Delta, hypers: Mapping[str, Hyper], collector: Collector) -> dict[str, str | None]:
    """What each name that `load` reads from was set to; E011 for one whose value stands in the rule, E009 for a number.

    A rule is data from a stranger: which directory is read is only for the user to say.
    """
    found: dict[str, str | None] = {}
    lets = {**delta.form.let, **delta.let}
    for param in (*delta.form.params, *delta.params):
        for call, expr in load_calls(param.init, lets):
            argument = call.args[0] if call.args else None
            if not isinstance(argument, ast.Name) or argument.id in found:
                continue
            given = delta.arguments.get(argument.id)
            name = given.text if isinstance(given, Expr) else argument.id if given is None else ""
            hyper = hypers.get(name)
            found[argument.id] = str(hyper.value) if hyper is not None and hyper.given else None
            if hyper is None:
                message = f"`{argument.id}` is no hyperparameter, so nobody can say where the stored delta lies"
                help = f"write hyper: {{{argument.id}: {{default: unset}}}}, and give it with --set {argument.id}=DIR"
                span = delta.span_at("form") if delta.form.name else expr.span_of(argument)
                collector.error("E011", message, span=span, help=help)
            elif not isinstance(hyper.value, str):
                message = f"`{name}` is {hyper.value}, and `load` takes a directory"
                collector.error("E009", message, span=hyper.span, help="a word, as in default: unset")
    return found


def _check_place(delta: Delta, param: Param, name: str, span: Span | None, collector: Collector) -> None:
    if delta.value is not None:
        help, reason = "start at a draw or at a number", "a carried value stands at no weight"
    elif name == "h":
        wrong = [tap for tap in delta.modify if tap not in ("weight", "bias")]
        help = "`h` is known at the start where `modify` is weight or bias; elsewhere read `weight`"
        reason = f"`{wrong[0]}` depends on the model's input" if wrong else ""
    else:
        pairs = [(site, tap) for site in delta.at for tap in delta.modify]
        without = [pair for pair in pairs if pair[0] in WEIGHTS and pair[1] not in WEIGHTS[pair[0]]]
        without += [pair for pair in pairs if pair[0] in ("block", "model")]
        known = [f"{', '.join(WEIGHTS[site])} of {site}" for site in delta.at if site in WEIGHTS]
        help = f"taps with a weight: {'; '.join(known) or 'none of a ' + ' or '.join(delta.at)}"
        reason = f"no single weight stands behind `{without[0][1]}` of {without[0][0]}" if without else ""
    if reason:
        collector.error("E004", f"`init` of `{param.name}` reads `{name}`: {reason}", span=span, help=help)
