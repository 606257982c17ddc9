"""Which layer of the table of methods a row of a rule computes, and at which module: import, backwards.

A row fits a layer when its form is the layer's form, parameter by parameter, its composition is the layer's or the
same sum of h and dh, and what it changes is what a module computes or stores as a whole. What the row is called, and
by which kind of site its rule found the place, does not matter.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import fx

from peftc.interop.coefficients import coefficients
from peftc.interop.rule_text import layer_text
from peftc.interop.table import Layer, Method
from peftc.ir.program import Program
from peftc.ir.sites import Site
from peftc.lang.expr import names_in
from peftc.lang.loader import parse_rule
from peftc.lang.rule import Delta, Form
from peftc.planning.plan import Edit, input_tap


@dataclass(frozen=True, slots=True)
class Fit:
    """An edit as a layer of a method: the module that it changes, and the options that say the rest."""

    edit: Edit
    layer: Layer
    path: str
    transposed: bool
    options: Mapping[str, Any]
    """Of this module alone; `alpha` of one may differ from another's."""
    flags: Mapping[str, bool]


def fits(edit: Edit, method: Method, program: Program) -> Iterator[Fit | str]:
    """Every layer of the method that the edit computes; a reason for one that only its place keeps it from."""
    listed = next((name for name in names_of(edit) if isinstance(edit.statics.get(name), tuple)), "")
    pairs = [(index, flags) for index in range(len(method.layers)) for flags in _flags(method)]
    for exact in (True, False):  # the words of the row, where the table has them, before another scale
        for index, flags in pairs:
            layer, wanted = method.layers[index], _reference(method.peft_type, index, tuple(flags.items()), listed)
            options = _options(edit, layer, wanted, exact=exact)
            if options is None:
                continue
            place = _place(edit, layer, wanted, program)
            if isinstance(place, str):
                yield place
            else:
                yield Fit(edit, layer, *place, options, flags)


def names_of(edit: Edit) -> set[str]:
    """The names that the edit's expressions read."""
    form, delta = edit.delta.form, edit.delta
    exprs = [*form.let.values(), *([form.dh] if form.dh is not None else []), delta.compose]
    return set().union(*(names_in(expr) for expr in exprs))


def _flags(method: Method) -> list[dict[str, bool]]:
    """The values of the options that choose words; the plain one first."""
    names = list(dict.fromkeys(choice["option"] for choice in method.words.values()))
    return [dict.fromkeys(names, value) for value in ((False, True) if names else (False,))]


@lru_cache(maxsize=256)
def _reference(peft_type: str, index: int, flags: tuple[tuple[str, bool], ...], listed: str) -> Delta:
    """The layer as a row of a rule would have it, with numbers that only stand for themselves."""
    text = layer_text(peft_type, index, dict(flags), listed)
    return parse_rule(text, "methods.yaml").deltas[0]


def _options(edit: Edit, layer: Layer, wanted: Delta, *, exact: bool) -> dict[str, Any] | None:
    """The options with which the layer computes what the edit does; None where there are none.

    `exact` asks for the layer's own composition; else any multiple of dh will do where the layer has a scale.
    """
    here = {name for name, parameter in edit.parameters.items() if parameter is not None}
    if here != layer.tensors.keys() or not _same_form(edit.delta.form, wanted.form):
        return None
    if edit.delta.let or edit.delta.params or edit.delta.sets:
        return None
    numbers = {name: entry for name, entry in layer.values.items() if isinstance(entry, Mapping) and "option" in entry}
    found = {entry["option"]: edit.statics[name] for name, entry in numbers.items() if name in edit.statics}
    if exact:
        same = _same(edit.delta.compose.tree, wanted.compose.tree)
        return found if same and len(found) == len({entry["option"] for entry in numbers.values()}) else None
    ours = coefficients(edit.delta.compose, edit.statics)
    if ours is None or ours[0] != 1.0 or layer.scale is None:
        return None
    unit = coefficients(wanted.compose, {**edit.statics, layer.scale: 1.0})
    if unit is None or unit[1] == 0.0:
        return None
    option = numbers[layer.scale]["option"]
    return {**{entry["option"]: 0 for entry in numbers.values()}, **found, option: _whole(ours[1] / unit[1])}


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _same(one: ast.AST, other: ast.AST) -> bool:
    return ast.dump(one) == ast.dump(other)


def _same_form(one: Form, other: Form) -> bool:
    """Whether two forms have the same parameters and compute the same expression of them."""
    if [p.name for p in one.params] != [p.name for p in other.params] or one.let.keys() != other.let.keys():
        return False
    for ours, theirs in zip(one.params, other.params, strict=True):
        shapes = [[ast.dump(size.tree) for size in param.shape] for param in (ours, theirs)]
        if shapes[0] != shapes[1] or (ours.frozen, ours.share) != (theirs.frozen, theirs.share):
            return False
    pairs = [(one.let[name].tree, other.let[name].tree) for name in one.let]
    pairs += [(one.dh.tree, other.dh.tree)] if one.dh is not None and other.dh is not None else []
    if one.attend is not None and other.attend is not None:
        pairs += [(one.attend.keys.tree, other.attend.keys.tree), (one.attend.values.tree, other.attend.values.tree)]
    missing = (one.dh is None) != (other.dh is None) or (one.attend is None) != (other.attend is None)
    return not missing and all(_same(ours, theirs) for ours, theirs in pairs)


def _place(edit: Edit, layer: Layer, wanted: Delta, program: Program) -> tuple[str, bool] | str:
    """The module that the edit changes as the layer would, and whether it stores [in, out]; or why there is none."""
    tap, site = edit.site.taps[edit.tap], edit.site
    if layer.at == "model":
        reason = next((why for name, why in layer.unless.items() if name in site.taps), None)
        if reason is not None:
            return f"{site.describe()} has more than PEFT reads: {reason}"
        same = site.kind == layer.at and edit.tap in wanted.modify
        return (site.path, False) if same else f"{site.describe()} is no {layer.at}"
    modify = wanted.modify[0]
    if tap.is_parameter:
        path = _weight_owner(edit, layer, program)
        name = program.parameter_name(tap.node)
        if path is not None and modify == edit.tap:
            return path, tap.layout == "transposed"
        return f"{name} is not the weight of a {layer.at} layer"
    if modify != "out":
        return f"`{edit.tap}` of {site.describe()} is not a weight"
    owner = _owner(tap.node, layer.at, program)
    if owner is None:
        return f"`{edit.tap}` of {site.describe()} is not the whole output of a {layer.at} layer"
    source, own = input_tap(edit.delta, site, edit.tap), input_tap(wanted, owner, "out")
    if source is None or own is None or site.taps[source].node is not owner.taps[own].node:
        return f"x of {site.describe()} is not what {owner.path} reads"
    return owner.path, owner.taps["weight"].layout == "transposed"


def _weight_owner(edit: Edit, layer: Layer, program: Program) -> str | None:
    """The module of the layer's kind that stores the weight, under one of its names."""
    site = edit.site
    name = program.parameter_name(site.taps[edit.tap].node) or ""
    first = program.tied.get(name, name)
    names = {first, name, *(other for other, owner in program.tied.items() if owner == first)}
    if site.kind == layer.at:
        return site.path if f"{site.path}.weight" in names else None
    same = (s.path for s in program.sites if s.kind == layer.at and f"{s.path}.weight" in names)
    return next(same, None) if layer.tied and site.kind == "linear" else None


def _owner(node: fx.Node, kind: str, program: Program) -> Site | None:
    return next((site for site in program.sites if site.kind == kind and site.taps["out"].node is node), None)
