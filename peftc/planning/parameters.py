"""Parameters of an edit: the name, shape, dtype, start and learning rate that a `params:` entry has at one site.

A parameter is named after the module that owns its site, or, where several sites share it, the module around them:

    encoder.layer.0.attention.peftc.prefix.P_k       share: site
    peftc.vera.q.A                                   share: model
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftc.diagnostics import fail
from peftc.ir.initial import Slot
from peftc.ir.program import DeltaParameter, Program
from peftc.ir.sites import Site
from peftc.lang.rule import Delta, Expr, Param, Scalar
from peftc.lang.static import evaluate_static
from peftc.locate.walk import common_path
from peftc.planning.dtypes import Dtypes
from peftc.planning.starts import start_of

if TYPE_CHECKING:
    from peftc.planning.plan import Edit

_LONGEST = 2**31


def ranks_of(sites: list[Site]) -> dict[int, int]:
    """Sites of different weights under one path are told apart by a number; calls of one module share."""
    seen: dict[str, list[tuple[str, ...]]] = {}
    ranks: dict[int, int] = {}
    for site in sites:
        identity = tuple(linear.weight_name for linear in site.linears.values()) or site.identity or (site.kind,)
        known = seen.setdefault(site.path, [])
        if identity not in known:
            known.append(identity)
        ranks[id(site)] = known.index(identity)
    return ranks


def parameter_of(
    program: Program, edit: Edit, param: Param, sites: list[Site], ranks: dict[int, int], kinds: Dtypes
) -> DeltaParameter | None:
    """The parameter that `param` is for one edit; None where its `if` is false. Raises `PeftcError` E014.

    `ranks` are those of `ranks_of(sites)`, the sites of the row.
    """
    delta, site, statics = edit.delta, edit.site, edit.statics
    if param.condition is not None and not evaluate_static(param.condition, statics):
        return None
    shape = tuple(_size(delta, param, size, statics) for size in param.shape)
    owner, middle = _owner(param, site, sites)
    rank = ranks[id(site)] if param.share == "site" else 0
    several = len(delta.modify) > 1 and not delta.sets
    slot = Slot(owner, delta.name, rank, edit.tap if several else "", middle)
    name = slot.name(param.name)
    kind = kinds.kind(param, name, site.taps[edit.tap].node.meta["val"].dtype)
    start, rate = start_of(program, edit, param, slot, shape), _rate(param, statics)
    return DeltaParameter(name, shape, kind, start, param.frozen, delta.name, rate)


def _size(delta: Delta, param: Param, size: Expr, statics: dict[str, Scalar]) -> int:
    value: Any = evaluate_static(size, statics)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LONGEST:
        fail(
            "E014",
            f"`{size.text}` of `{param.name}` in delta `{delta.name}` is {value}; a size is a whole number "
            f"from 1 to {_LONGEST}",
            span=size.span or param.span,
            help="change the hyperparameters it comes from with --set",
        )
    return value


def _rate(param: Param, statics: dict[str, Scalar]) -> float:
    """What the learning rate is multiplied by."""
    value = 1.0 if param.lr is None else evaluate_static(param.lr, statics)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        message = f"`lr` of `{param.name}` is {value}; it multiplies the learning rate, so it is a number from 0 on"
        fail("E014", message, span=param.lr.span if param.lr else param.span, help="as in lr: 16")
    return float(value)


def _owner(param: Param, site: Site, sites: list[Site]) -> tuple[str, str]:
    """The module that holds a parameter, and what tells its share group from the others under that module."""
    if param.share == "site":
        return site.path, ""
    if param.share == "layer":
        return site.block, ""
    if param.share == "model":
        return "", ""
    same = [s for s in sites if s.stack == site.stack and (param.share == "stack" or s.variant == site.variant)]
    if len({s.tower for s in same if s.tower}) > 1:
        same = [s for s in same if s.tower == site.tower]
    path = common_path(s.path for s in same)
    if any(s.path[len(path) + 1 :].split(".")[0].isdigit() for s in same):
        path = path.rpartition(".")[0]  # a list of layers is no place for a parameter: take the module around it
    return path, site.stack if param.share == "stack" else f"{site.stack}_{site.variant or site.kind}"
