"""Starts: what a parameter's `init` means at one site, as a part of planning; no value is computed.

A number and a random draw stand for themselves; anything else becomes a recipe that names the stored tensors it reads.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import TYPE_CHECKING

from peftc.diagnostics import fail
from peftc.ir.initial import Init, Recipe, Saved, Slot, Stored
from peftc.ir.weights import parameter_at, weight_behind
from peftc.lang.init_graph import draw_numbers
from peftc.lang.inits import init_names, is_draw, load_calls
from peftc.lang.rule import Expr, Param
from peftc.lang.static import evaluate_static

if TYPE_CHECKING:
    from peftc.ir.program import Program
    from peftc.planning.plan import Edit


def start_of(program: Program, edit: Edit, param: Param, slot: Slot, shape: tuple[int, ...]) -> Init:
    """How `param` starts at the site of `edit`, whose parameters above it are known."""
    expr, statics = param.init, edit.statics
    call = expr.tree.func if isinstance(expr.tree, ast.Call) else expr.tree
    if isinstance(call, ast.Name) and is_draw(expr.tree) and call.id not in statics:
        arguments = expr.tree.args if isinstance(expr.tree, ast.Call) else []
        return Init(call.id, draw_numbers(expr, arguments, statics))
    if (isinstance(expr.tree, ast.Name) and expr.tree.id in statics) or _is_number(expr):
        value = evaluate_static(expr, statics)
        if not isinstance(value, (int, float)):
            fail("E009", f"`init` of `{param.name}` is {value!r}, not a number", span=expr.span)
        return Init("constant", (float(value),))
    delta = edit.delta
    lets = {**delta.form.let, **({} if param in delta.form.params else delta.let)}
    read = init_names(expr, lets)
    frozen = _frozen(program, edit, {name for name in read if name not in (*edit.parameters, *lets, *statics)})
    above = {name: parameter for name, parameter in edit.parameters.items() if name in read}
    saved = {ast.unparse(call): _saved(edit, param, call, part, slot, shape) for call, part in load_calls(expr, lets)}
    return Init("recipe", (), Recipe(expr, edit.site.describe(), statics, frozen, above, lets, saved))


def _saved(edit: Edit, param: Param, call: ast.Call, expr: Expr, slot: Slot, shape: tuple[int, ...]) -> Saved:
    """What a call of `load` reads: of the same site and tap, by default of the same row and parameter."""
    place, *named = call.args
    assert isinstance(place, ast.Name)
    row, parameter = slot.row, param.name
    if named and isinstance(named[0], ast.Attribute) and isinstance(named[0].value, ast.Name):
        row, parameter = named[0].value.id, named[0].attr
    given = edit.delta.arguments.get(place.id)
    hyper = given.text if isinstance(given, Expr) else place.id
    there = replace(slot, row=row, tap=edit.tap)
    return Saved(hyper, edit.delta.places.get(place.id), there, parameter, shape, expr.span_of(call))


def _is_number(expr: Expr) -> bool:
    """Whether `expr` is a number, perhaps with a minus."""
    tree = expr.tree.operand if isinstance(expr.tree, ast.UnaryOp) else expr.tree
    return isinstance(tree, ast.Constant)


def _frozen(program: Program, edit: Edit, names: set[str]) -> dict[str, Stored]:
    """What of `weight` and `h` is read, where the site has it."""
    found: dict[str, Stored | None] = {}
    if "weight" in names:
        found["weight"] = weight_behind(program, edit.site, edit.tap)
    if "h" in names and edit.tap in ("weight", "bias"):
        found["h"] = parameter_at(program, edit.site.taps[edit.tap])
    return {name: stored for name, stored in found.items() if stored is not None}
