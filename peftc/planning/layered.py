"""Values of single layers against a model: that the layers exist, and that what is shared fits every layer alike.

hyper:
  r: {default: 8, layers: {0: 16, last 2: 32}}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from peftc.diagnostics import Collector
from peftc.lang.layers import layer_set, shown_layers
from peftc.lang.rule import Param, Rule, Scalar

if TYPE_CHECKING:
    from peftc.ir.program import DeltaParameter
    from peftc.ir.sites import Site
    from peftc.planning.plan import Edit, Plan


def check_layers(rule: Rule, sites: Sequence[Site], collector: Collector) -> None:
    """E053 for a value of layers that no stack of the model has."""
    counts: dict[str, int] = {}
    for site in (site for site in sites if site.layer >= 0):
        counts[site.stack] = max(counts.get(site.stack, 0), int(site.dims.get("layers", 0)))
    for hyper in rule.hyper.values():
        for given in hyper.layers:
            if not any(layer_set(given.layers, count) for count in counts.values()):
                has = ", ".join(f"the {stack} has layers 0 to {count - 1}" for stack, count in counts.items())
                message = f"`{hyper.name}` has a value for layer {given.text}, which is no layer of the model"
                collector.error("E053", message, span=given.span, help=has or "this model has no layers")


def check_shared(edits: Iterable[Edit], collector: Collector) -> None:
    """E053 for a tensor that several sites share and that they want in different sizes, or with different values."""
    first: dict[str, tuple[Edit, DeltaParameter]] = {}
    told: set[str] = set()
    for edit in edits:
        for name, parameter in edit.parameters.items():
            if parameter is None or parameter.name in told:
                continue
            other, known = first.setdefault(parameter.name, (edit, parameter))
            if (known.shape, known.init) != (parameter.shape, parameter.init):
                told.add(parameter.name)
                _tell_unlike(_declared(edit, name), known, other.site, parameter, edit.site, collector)


def _declared(edit: Edit, name: str) -> Param:
    return next(param for param in (*edit.delta.form.params, *edit.delta.params) if param.name == name)


def _tell_unlike(
    param: Param, known: DeltaParameter, there: Site, wanted: DeltaParameter, here: Site, collector: Collector
) -> None:
    sizes = [list(known.shape), list(wanted.shape)]
    what = f"is {sizes[0]}" if sizes[0] != sizes[1] else f"starts as {known.init}"
    other = sizes[1] if sizes[0] != sizes[1] else wanted.init
    message = f"`{param.name}` is one tensor for each {param.share}, but {what} at {there.describe()}"
    help = "let fewer sites share it, or give what its shape reads one value for all of them"
    collector.error("E053", f"{message} and {other} at {here.describe()}", span=param.span, help=help)


def per_layer(plan: Plan) -> dict[str, dict[str, dict[int, Scalar]]]:
    """The values of each hyperparameter that differs between layers: by its name, by stack, by layer."""
    counts: dict[str, int] = {}
    for edit in plan.edits:
        if edit.site.layer >= 0:
            counts[edit.site.stack] = max(counts.get(edit.site.stack, 0), int(edit.site.dims["layers"]))
    return {
        name: {stack: {layer: hyper.at(layer, count) for layer in range(count)} for stack, count in counts.items()}
        for name, hyper in plan.rule.hyper.items()
        if hyper.layers
    }


def describe_layers(values: dict[str, dict[int, Scalar]]) -> str:
    """Values by stack and layer in words: `16 in layers 0-3, 8 in layers 4-11`."""
    parts: list[str] = []
    for stack, layers in values.items():
        groups: dict[Scalar, set[int]] = {}
        for layer, value in layers.items():
            groups.setdefault(value, set()).add(layer)
        where = f" of the {stack}" if len(values) > 1 else ""
        parts += [f"{value} in {shown_layers(found)}{where}" for value, found in groups.items()]
    return ", ".join(parts)
