"""Rules that train nothing: every row is a formula of frozen numbers, and no parameter of the base is under `train`.

    W013 warning: `skip` trains nothing: no row has a parameter that trains, and there is no `train`
      --> mine.yaml:4:3

A rule may be meant so (a rewrite that leaves a layer out), hence a warning. One that puts stored deltas together, by
`load`, says by that what it is for.
"""

from __future__ import annotations

from peftc.diagnostics import Diagnostic, PeftcError
from peftc.lang.rule import Param, Rule
from peftc.lang.static import evaluate_static

_HELP = "give a row `params` that are not frozen, or list parameters of the base under `train`"


def check_trains(rule: Rule) -> list[Diagnostic]:
    """W013 where no parameter can train whatever the model is; a condition on a model's sizes may hold."""
    if any(delta.places for delta in rule.deltas):
        return []
    params = [param for delta in rule.deltas for param in (*delta.form.params, *delta.params)]
    if rule.train or any(_may_train(param, rule) for param in params):
        return []
    reason = "every parameter of its rows is frozen or left out" if params else "no row has a parameter that trains"
    return [idle(rule, f"{reason}, and there is no `train`")]


def idle(rule: Rule, reason: str) -> Diagnostic:
    """W013 at the first row."""
    span = rule.deltas[0].span if rule.deltas else None
    return Diagnostic("W013", f"`{rule.name}` trains nothing: {reason}", span, _HELP, "warning")


def _may_train(param: Param, rule: Rule) -> bool:
    if param.frozen or param.condition is None:
        return not param.frozen
    try:
        return bool(evaluate_static(param.condition, rule.values))
    except PeftcError:
        return True
