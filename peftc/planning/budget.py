"""Budgets: the largest value of a hyperparameter with which a rule trains no more parameters than it may.

`solve` is pure: it asks for plans of the rule at values it chooses, and counts. The count must grow with the value.

    r: {budget: 0.5%}      547 of 109,482 parameters: r = 1 trains 512, r = 2 would train 1,024
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from peftc.diagnostics import PeftcError, fail
from peftc.lang.rule import Budget, Hyper, Rule

if TYPE_CHECKING:
    from peftc.planning.plan import Plan

_LARGEST = 2**31
"""Values up to here are tried where the hyperparameter has no `max`."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What became of a budget: the value found, what it trains, and what the next one would."""

    hyper: str
    value: int
    budget: str
    limit: int
    trained: int
    base: int
    following: int | None
    """What the next value would train; None where it is beyond `max`, or refused for another reason."""

    def describe(self) -> str:
        share = f"{100 * self.trained / self.base:.2f} % of {self.base:,}"
        line = f"{self.hyper} = {self.value}: {self.trained:,} parameters, {share} (budget {self.budget})"
        if self.following is None:
            return f"{line}; {self.hyper} = {self.value + 1} is not admitted"
        return f"{line}; {self.hyper} = {self.value + 1} would be {self.following:,}"


def solve(rule: Rule, plan: Callable[[Rule], Plan]) -> Plan:
    """The plan of `rule` with the largest value that its budget allows in place of the budget, in its text too.

    Raises `PeftcError`: E052 when the smallest value is too much, when nothing bounds the value, or when the count
    falls as the value grows; and what the plan of the smallest value raises.
    """
    hyper = rule.budgeted
    assert hyper is not None and hyper.budget is not None
    return _Search(rule, hyper, hyper.budget, plan, {}).best()


@dataclass(frozen=True, slots=True)
class _Search:
    rule: Rule
    hyper: Hyper
    budget: Budget
    plan: Callable[[Rule], Plan]
    plans: dict[int, Plan | None]
    """Plans by value; None for a value that is refused."""

    def best(self) -> Plan:
        assert not isinstance(self.hyper.value, tuple)  # a list has no budget: `--set` and the reader refuse one
        low = int(self.hyper.value or 1)
        base = self.plan(self._with(low))
        self.plans[low] = base
        limit = self.budget.limit(base.base_count)
        if base.trained_count > limit:
            self._refuse_small(base, low, limit)
        value = self._bisected(low, limit)
        self._refuse_falling()
        best, following = self.plans[value], self._plan(value + 1) if value < self._most else None
        assert best is not None
        spent = Spent(
            self.hyper.name, value, self.budget.text, limit, best.trained_count, best.base_count,
            None if following is None else following.trained_count,
        )  # fmt: skip
        return replace(best, rule=_resolved(self._with(value), self.hyper.name), budget=spent)

    @property
    def _most(self) -> int:
        return _LARGEST if self.hyper.max is None else int(self.hyper.max)

    def _bisected(self, low: int, limit: int) -> int:
        high = 2 * low
        while high <= self._most and self._fits(high, limit):
            low, high = high, 2 * high
        if high > self._most:
            if self._fits(self._most, limit):
                if self.hyper.max is None:
                    self._refuse_unbounded()
                return self._most
            high = self._most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle, limit) else (low, middle)
        return low

    def _fits(self, value: int, limit: int) -> bool:
        plan = self._plan(value)
        return plan is not None and plan.trained_count <= limit

    def _plan(self, value: int) -> Plan | None:
        if value not in self.plans:
            try:
                self.plans[value] = self.plan(self._with(value))
            except PeftcError:  # a size too large, or a condition that only smaller values meet
                self.plans[value] = None
        return self.plans[value]

    def _with(self, value: int) -> Rule:
        hyper = replace(self.hyper, value=value, budget=None)
        return replace(self.rule, hyper={**self.rule.hyper, hyper.name: hyper})

    def _refuse_small(self, plan: Plan, low: int, limit: int) -> None:
        name, allowed = self.hyper.name, f"{limit:,} of {plan.base_count:,} parameters"
        message = f"the budget of `{name}`, {self.budget.text}, allows {allowed}"
        message += f"; {name} = {low} already trains {plan.trained_count:,}"
        help = "give a larger budget, or narrow the rows with `where`"
        fail("E052", message, span=self.budget.span, help=help)

    def _refuse_unbounded(self) -> None:
        message = f"the budget of `{self.hyper.name}` does not bound it: any value trains few enough parameters"
        fail("E052", message, span=self.budget.span, help="give it a `max`, or a value")

    def _refuse_falling(self) -> None:
        counts = [(value, plan.trained_count) for value, plan in sorted(self.plans.items()) if plan is not None]
        for (less, many), (more, few) in pairwise(counts):
            if few < many:
                name = self.hyper.name
                message = f"fewer parameters train as `{name}` grows: {many:,} at {less}, {few:,} at {more}"
                help = "a budget is for a size with which the number of parameters grows"
                fail("E052", message, span=self.budget.span, help=help)


def _resolved(rule: Rule, name: str) -> Rule:
    """`rule` with a text that holds the value of `name` and no budget."""
    from peftc.lang.loader import parse_rule

    return replace(rule, text=parse_rule(rule.text, rule.file, {name: rule.values[name]}).text)
