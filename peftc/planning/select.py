"""Selection: which sites a delta's `at` and `where` mean, and, when none, which condition was nearest to holding."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from peftc.diagnostics import Span
from peftc.ir.sites import Site
from peftc.lang.expr import names_in
from peftc.lang.layers import layer_set
from peftc.lang.rule import Delta, Expr, Rule, Scalar, Where
from peftc.lang.sites import DIMS
from peftc.lang.static import evaluate_static

if TYPE_CHECKING:
    from peftc.patterns.sites import NearestMiss

Condition = tuple[str, Callable[[Site], bool]]


def selected(delta: Delta, rule: Rule, sites: Sequence[Site]) -> list[Site]:
    """The sites of the kinds `delta.at` for which every condition of `delta.where` holds, in graph order."""
    conditions = _conditions(delta.where, rule)
    return [site for site in sites if site.kind in delta.at and all(holds(site) for _, holds in conditions)]


def described(where: Where, rule: Rule, sites: Iterable[Site]) -> list[Site]:
    """The sites, of any kind, for which every condition of `where` holds."""
    conditions = _conditions(where, rule)
    return [site for site in sites if all(holds(site) for _, holds in conditions)]


def _conditions(where: Where, rule: Rule) -> list[Condition]:
    conditions: list[Condition] = []
    if where.layers is not None:
        conditions.append(("layers", lambda site: _in_layers(site, where)))
    if where.stack:
        conditions.append(("stack", lambda site: site.stack in where.stack))
    if where.kind:
        conditions.append(("kind", lambda site: site.variant in where.kind))
    if where.role:
        conditions.append(("role", lambda site: site.role in where.role))
    if where.path:
        conditions.append(("path", lambda site: any(fnmatch.fnmatchcase(site.path, glob) for glob in where.path)))
    condition = where.condition
    if condition is not None:
        conditions.append(("if", lambda site: bool(evaluate_static(condition, condition_env(site, rule)))))
    return conditions


def _in_layers(site: Site, where: Where) -> bool:
    """Whether the site's layer is meant; a site outside of every layer (an embedding, a head) never is."""
    return site.layer >= 0 and site.layer in layer_set(where.layers, int(site.dims["layers"]))


def condition_env(site: Site, rule: Rule) -> dict[str, Scalar]:
    """What `where.if` sees: hyperparameters and the site's dimensions; 0 for one that this kind of site lacks."""
    env: dict[str, Scalar] = dict.fromkeys(DIMS, 0)
    env["has_bias"] = False
    env.update(site.dims)
    env.update(rule.values_at(site.layer, int(site.dims.get("layers", 0))))
    return env


def nearest_miss(
    delta: Delta, rule: Rule, sites: Sequence[Site], missed: Mapping[str, Callable[[], NearestMiss]]
) -> tuple[str, Span | None, str]:
    """Why nothing matched: message, place and help, for the condition that excluded the last candidates.

    `missed` are the patterns that found nothing, each told at the line of the pattern that excluded the nearest.
    """
    of_kind = [site for site in sites if site.kind in delta.at]
    wanted = " or ".join(delta.at)
    own = next((missed[name] for name in delta.at if name in missed), None)
    if not of_kind and own is not None:
        reason, span, place = own().told()
        at = delta.span_at("at")
        help = f"{place}{'; ' if place else ''}the row is at {at}" if at is not None else place
        return f"delta `{delta.name}` matches nothing: {reason}", span, help
    if not of_kind:
        from peftc.planning.nearest import offer  # it reads `selected`

        message = f"delta `{delta.name}` matches nothing: this model has no {wanted} site"
        return message, delta.span_at("at"), offer(delta, rule, sites)
    left = of_kind
    for name, holds in _conditions(delta.where, rule):
        kept = [site for site in left if holds(site)]
        if not kept:
            excluded = f"`where.{name}` excludes the last {len(left)} {wanted} sites"
            message = f"delta `{delta.name}` matches nothing: {excluded}"
            span = delta.where.spans.get(name) or delta.span_at("where")
            return message, span, f"these sites have: {_values(name, left, delta.where.condition)}"
        left = kept
    return f"delta `{delta.name}` matches nothing", delta.span, ""


def _values(name: str, sites: list[Site], condition: Expr | None) -> str:
    if name == "layers":
        last = max(site.layer for site in sites)
        return f"layers 0 to {last}" if last >= 0 else "no layer"
    asked = names_in(condition) if condition is not None else set()
    read: dict[str, Callable[[Site], str]] = {
        "stack": lambda site: site.stack,
        "kind": lambda site: site.variant or "no kind",
        "role": lambda site: site.role or "no role",
        "path": lambda site: site.path,
        "if": lambda site: " and ".join(f"{k}={v}" for k, v in site.dims.items() if k in asked),
    }
    found = list(dict.fromkeys(read[name](site) for site in sites))
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
