"""What a model has, and what of the library fits it, for a row that asks for a kind of site that the model lacks.

    it has: 8 linear (x, out, weight), 5 norm (x, out, weight), 2 block (x, out); this form fits `at: linear,
    modify: out`; rules that apply: lora_linear, norm_tuning

A rule applies when each of its rows finds a site with the taps it changes; nothing is planned.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftc.ir.sites import Site
from peftc.lang.expr import names_in
from peftc.lang.rule import Delta, Form, Rule
from peftc.lang.sites import DIMS, SITES, TAPS
from peftc.planning.select import selected

_MOST = 3
_EVERYWHERE = frozenset({"d_in", "d_out", "layer", "layers", "has_bias", "x", "h"})
"""What a linear layer gives to the expressions of a form."""


def offer(delta: Delta, rule: Rule, sites: Sequence[Site]) -> str:
    """In a line: the kinds of sites with their counts and taps, where the row's form fits, and rules that apply."""
    parts = [f"it has: {inventory(sites)}"]
    if delta.value is None and not delta.sets and any(site.kind == "linear" for site in sites) and _fits(delta):
        parts.append("this form fits `at: linear, modify: out`")
    names = nearest_rules(rule, sites)
    if names:
        parts.append(f"rules of the library that apply: {', '.join(names)}")
    return "; ".join(parts)


def inventory(sites: Sequence[Site]) -> str:
    """Each kind of site but the model itself with its count and the taps that all its sites have."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        if site.kind != "model":
            found.setdefault(site.kind, []).append(site)
    ordered = sorted(found.items(), key=lambda entry: list(SITES).index(entry[0]) if entry[0] in SITES else len(SITES))
    told: list[str] = []
    for kind, own in ordered:
        known = SITES.get(kind, tuple(own[0].taps))
        taps = [tap for tap in known if all(tap in site.taps for site in own)]
        told.append(f"{len(own)} {kind} ({', '.join(taps)})" if taps else f"{len(own)} {kind}")
    return ", ".join(told) or "nothing but the model itself"


def nearest_rules(rule: Rule, sites: Sequence[Site]) -> list[str]:
    """Names of rules of the library that apply: those with the rule's forms first, then with words of its name."""
    from peftc.lang.loader import list_rules

    forms, words, kinds = _forms(rule), set(rule.name.split("_")), _kinds(rule)
    others = [other for other in list_rules() if other.name != rule.name and other.deltas and applies(other, sites)]

    def distance(other: Rule) -> tuple[int, int, int, int, str]:
        common = len(words & set(other.name.split("_")))
        return -len(forms & _forms(other)), -common, -len(kinds & _kinds(other)), len(other.deltas), other.name

    return [other.name for other in sorted(others, key=distance)[:_MOST]]


def applies(rule: Rule, sites: Sequence[Site]) -> bool:
    """Whether each row finds sites that have the taps it changes.

    False for rules of which that does not tell it: those that wait for a stored delta, or make the sequence longer.
    """
    told = not any(delta.places or "model" in delta.at for delta in rule.deltas)
    return told and all(_reaches(delta, rule, sites) for delta in rule.deltas)


def _reaches(delta: Delta, rule: Rule, sites: Sequence[Site]) -> bool:
    found = selected(delta, rule, sites)
    needed = set(delta.modify) - delta.optional
    return bool(found) and all(needed <= site.taps.keys() for site in found)


def _forms(rule: Rule) -> set[str]:
    return {delta.form.name for delta in rule.deltas if delta.form.name}


def _kinds(rule: Rule) -> set[str]:
    return {kind for delta in rule.deltas for kind in delta.at}


def _fits(delta: Delta) -> bool:
    """Whether the row reads nothing but x, h and the sizes that a linear layer has."""
    form: Form = delta.form
    if form.attend is not None or delta.sources or delta.insert not in ("parallel", "sequential"):
        return False
    exprs = [*form.let.values(), *delta.let.values(), delta.compose, *([form.dh] if form.dh is not None else [])]
    exprs += [size for param in (*form.params, *delta.params) for size in param.shape]
    own = {param.name for param in (*form.params, *delta.params)} | {
        *form.let,
        *delta.let,
        *delta.arguments,
        *form.args,
    }
    read = set().union(*(names_in(expr) for expr in exprs)) - own
    return not read & ({*DIMS, *TAPS, "gate", "prepend"} - _EVERYWHERE)
