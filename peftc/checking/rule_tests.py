"""Runs the tests inside rules: each case on its built-in family, on one trace for all cases of that family.

    results = run_tests(load_rule("lora"), "lora")
    results[0].outcome          # "validated"

| outcome   | when                                                                                              |
|-----------|---------------------------------------------------------------------------------------------------|
| validated | everything that the case says holds                                                               |
| noisy     | the rule reaches further than the case says: more sites, more parameters, or a forbidden site     |
| missing   | something that the case says does not hold                                                        |
| failed    | the rule is refused, the run is not finite, or the folded model differs from the unfolded         |
| untested  | the rule has no tests                                                                             |

Numbers are compared in float64. Deltas that are folded or compared with another rule's have random values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from peftc.checking.families import Subject, forget_spoilt, traced
from peftc.checking.rule_test_states import distance, finite, initial_state, random_state
from peftc.diagnostics import PeftcError, Span
from peftc.lang.loader import load_rule
from peftc.lang.rule import Case, Rule, SameAs

if TYPE_CHECKING:
    from peftc.ir.program import Program
    from peftc.ir.sites import Site
    from peftc.planning.plan import Edit, Plan

Outcome = Literal["validated", "noisy", "missing", "failed", "untested"]
_WORST_FIRST: tuple[Outcome, ...] = ("failed", "missing", "noisy", "validated")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Differences that count as none, of outputs of order 1 (beyond, they grow with the outputs), by the deltas' dtype."""

_VISIBLE = 1e-6
"""A difference that counts as one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One expectation that does not hold, with its place."""

    outcome: Outcome
    key: str
    expected: str
    found: str
    span: Span | None


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one case on one family; a rule without tests has one result, with no case."""

    rule: str
    """The rule's name or file as it was given."""
    case: str
    outcome: Outcome
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0


def run_tests(rule: Rule, source: str, wanted: str = "") -> Iterator[Result]:
    """The results of the cases whose `rule::test[family]` holds `wanted`; `source` is what `rule` was loaded from."""
    if not rule.tests and wanted.lower() in f"{rule.name}::".lower():
        yield Result(source, "", "untested")
    for case in rule.tests:
        if wanted.lower() in f"{rule.name}::{case.label}".lower():
            yield run_case(source, case)


def run_case(source: str, case: Case) -> Result:
    """Run one case of the rule that `source` names."""
    start = time.perf_counter()
    trial = _Trial(source, case)
    try:
        trial.run()
    except PeftcError as error:
        trial.refused(error)
    finally:
        forget_spoilt()
    outcomes: list[Outcome] = [*(finding.outcome for finding in trial.findings), _WORST_FIRST[-1]]
    worst = min(outcomes, key=_WORST_FIRST.index)
    return Result(source, case.label, worst, tuple(trial.findings), time.perf_counter() - start)


@dataclass(slots=True)
class _Trial:
    """One case while it runs."""

    source: str
    case: Case
    findings: list[Finding] = field(default_factory=list)

    def tell(self, outcome: Outcome, key: str, expected: object, found: object) -> None:
        self.findings.append(Finding(outcome, key, str(expected), str(found), self.case.span_at(key)))

    def run(self) -> None:
        from peftc.pipeline import rewrite

        case = self.case
        rule = load_rule(self.source, case.hyper)
        subject = traced(case.family, case.head)
        program = subject.program()
        plan = rewrite(program, rule)
        if case.error is not None:
            self.tell("missing", "error", f"refused with {case.error}", "the rule applies")
            return
        self._count(plan)
        self._forbidden(plan, rule, program)
        if case.identity is not None or case.fold or case.same_as is not None:
            self._compute(subject, program, plan, rule)

    def refused(self, error: PeftcError) -> None:
        """The rule, or a model with it, was refused with an error."""
        first = error.diagnostics[0]
        codes = [told.code for told in error.diagnostics]
        if self.case.error in codes:
            return
        told = f"{first.code}: {first.message}" + (f" ({first.span})" if first.span else "")
        if self.case.error is not None:
            self.tell("failed", "error", f"refused with {self.case.error}", told)
        elif first.code == "E020" and self.case.sites:
            self.tell("missing", "sites", "sites", told)
        else:
            self.tell("failed", "family", "the rule applies", told)

    def _count(self, plan: Plan) -> None:
        for row, expected in self.case.sites.items():
            found = len(plan.sites_of(row))
            if found != expected:
                outcome: Outcome = "noisy" if found > expected else "missing"
                self.tell(outcome, f"sites.{row}", f"{_sites(expected)} of `{row}`", _sites(found))
        if self.case.trained is not None and plan.trained_count != self.case.trained:
            more = plan.trained_count > self.case.trained
            found = f"{plan.trained_count:,} ({_by_row(plan)})"
            self.tell("noisy" if more else "missing", "trained", f"{self.case.trained:,} trained parameters", found)

    def _forbidden(self, plan: Plan, rule: Rule, program: Program) -> None:
        from peftc.planning.select import described

        if self.case.forbidden is None:
            return
        forbidden = described(self.case.forbidden, rule, program.sites)
        if not forbidden:
            self.tell("missing", "not", "sites that a row could touch", "the model has no such site")
        pairs = [(edit, site) for edit in plan.edits for site in forbidden]
        touched = [(edit, site, tap) for edit, site in pairs if (tap := _touched(edit, site))]
        if touched:
            edit, site, tap = touched[0]
            more = f" (and {len(touched) - 1} more)" if len(touched) > 1 else ""
            found = f"row `{edit.delta.name}` changes `{tap}` of {site.describe()}{more}"
            self.tell("noisy", "not", "no row touches such a site", found)

    def _compute(self, subject: Subject, program: Program, plan: Plan, rule: Rule) -> None:
        tolerance = max((TOLERANCE.get(p.dtype, 1e-10) for p in plan.parameters.values()), default=1e-10)
        if self.case.identity is not None:
            self._identity(subject, program, plan, tolerance)
        if not self.case.fold and self.case.same_as is None:
            return
        key = "fold" if self.case.fold else "same_as"
        state = random_state(subject, program, plan)
        run = _Run(subject, program, state, subject.run(program, state), tolerance)
        if not finite(run.outputs):
            self.tell("failed", key, "finite outputs with random deltas", "NaN or infinity")
        elif distance(subject.outputs, run.outputs) < _VISIBLE:
            self.tell("failed", key, "deltas that change the outputs", "random values in them change nothing")
        elif self.case.same_as is not None:
            self._same_as(run, plan, self.case.same_as)
        if self.case.fold:
            self._fold(run)

    def _identity(self, subject: Subject, program: Program, plan: Plan, tolerance: float) -> None:
        apart = distance(subject.outputs, subject.run(program, initial_state(subject, plan)))
        if self.case.identity and apart > tolerance:
            expected = f"the base's outputs before training (within {tolerance:.0e})"
            self.tell("missing", "identity", expected, f"they differ by {apart:.2e}")
        elif not self.case.identity and apart < _VISIBLE:
            expected = "other outputs than the base's before training"
            self.tell("missing", "identity", expected, f"they differ by {apart:.2e}")

    def _fold(self, run: _Run) -> None:
        from peftc.fold.program_state import folded_state
        from peftc.passes.fold import Fold

        fold = Fold()
        fold.apply(run.program)
        for row, expected in self.case.fold.items():
            decisions = [d for d in fold.decisions if d.insertion.delta.partition(".")[0] == row]
            other = [d for d in decisions if d.result != expected]
            if other or not decisions:
                why = f"{other[0].result} at {len(other)} of {_sites(len(decisions))}" if other else "no site"
                reason = f": {other[0].reason}" if other and other[0].reason else ""
                self.tell("missing", f"fold.{row}", f"`{row}` is {expected}", why + reason)
        if any(decision.result != "kept" for decision in fold.decisions):
            apart = run.apart(run.program, folded_state(run.state.__getitem__, run.program, fold))
            if apart > run.tolerance:
                expected = f"the unfolded model's outputs (within {run.tolerance:.0e})"
                self.tell("failed", "fold", expected, f"the folded model's differ by {apart:.2e}")

    def _same_as(self, run: _Run, plan: Plan, same: SameAs) -> None:
        from peftc.checking.counterparts import Unpaired, other_rule, pairs
        from peftc.pipeline import rewrite

        program = run.subject.program()
        theirs = rewrite(program, other_rule(same, plan.rule.file))
        found = pairs(plan, theirs, same.map)
        if isinstance(found, Unpaired):
            self.tell("missing", "same_as", f"the parameters of `{same.rule}`", found.reason)
            return
        apart = run.apart(program, {**run.state, **{name: run.state[ours] for ours, name in found.items()}})
        if apart > run.tolerance:
            expected = f"the outputs of `{same.rule}` (within {run.tolerance:.0e})"
            self.tell("missing", "same_as", expected, f"they differ by {apart:.2e}")


@dataclass(frozen=True, slots=True)
class _Run:
    """The adapted model with random deltas: its tensors, its outputs, and what counts as no difference of them."""

    subject: Subject
    program: Program
    state: dict[str, torch.Tensor]
    outputs: list[list[torch.Tensor]]
    tolerance: float

    def apart(self, program: Program, state: dict[str, torch.Tensor]) -> float:
        """How far the outputs of another program, or of other tensors, are from these."""
        return distance(self.outputs, self.subject.run(program, state))


_MADE_BY = {
    "q": ("q", "qkv"), "k": ("k", "qkv"), "v": ("v", "qkv"), "out": ("o", "down"), "up": ("up", "gate_up"),
    "gate": ("gate", "gate_up"),
}  # fmt: skip
"""Which linear of an attention or an FFN makes the value of a tap."""


def _touched(edit: Edit, site: Site) -> str | None:
    """The first tap of the edit that is a value or a weight of the site; what the site only reads is not its own."""
    if edit.site is site:
        return edit.tap
    own = {tap.node for name, tap in site.taps.items() if name not in ("x", "ctx")}
    for name, tap in edit.written:
        linears = [edit.site.linears[role] for role in _MADE_BY.get(name, ()) if role in edit.site.linears]
        if tap.node in own or any(linear.weight in own for linear in linears):
            return name
    return None


def _sites(count: int) -> str:
    return f"{count} site" + ("" if count == 1 else "s")


def _by_row(plan: Plan) -> str:
    """Trained elements by row, such as `lora 1,024`."""
    counts: dict[str, int] = {}
    for parameter in plan.parameters.values():
        if not parameter.frozen:
            counts[parameter.delta] = counts.get(parameter.delta, 0) + parameter.numel
    parts = [f"{row} {count:,}" for row, count in counts.items()]
    base = plan.trained_count - plan.delta_count
    return ", ".join([*parts, *([f"of the base {base:,}"] if base else [])]) or "none"
