"""What `peftc check` says of the tests in a rule beyond their words, without running them.

A test that compares with another rule needs that rule (E018 and what is wrong with it), and its `map` names rows and
parameters (E061). A test that says `identity: true` of a row that surely changes the outputs is doubtful (W020).
"""

from __future__ import annotations

from collections.abc import Iterator

from peftc.checking.counterparts import other_rule
from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean
from peftc.lang.rule import Case, Rule
from peftc.lang.start import changes_outputs


def check_tests(rule: Rule) -> list[Diagnostic]:
    """Mistakes and warnings about the tests of a rule that is right otherwise."""
    once = {case.name: case for case in rule.tests}
    found = [told for case in once.values() for told in _same_as(rule, case)]
    return [*found, *_identities(rule)]


def _same_as(rule: Rule, case: Case) -> Iterator[Diagnostic]:
    same = case.same_as
    if same is None:
        return
    span = case.span_at("same_as.rule")
    try:
        other = other_rule(same, rule.file)
    except PeftcError as error:
        first = error.diagnostics[0]
        where = f" ({first.span})" if first.span else ""
        yield Diagnostic(first.code, f"`same_as`: {first.message}{where}", span, first.help)
        return
    for which, words, side in (("here", same.map.keys(), rule), (f"in `{same.rule}`", same.map.values(), other)):
        known = _names(side)
        for word in words:
            if word.partition(".")[0] not in known:
                message = f"`map`: there is no row or parameter `{word}` {which}"
                yield Diagnostic("E061", message, case.span_at("same_as.map"), did_you_mean(word, known))


def _names(rule: Rule) -> set[str]:
    """The names of a rule's rows and parameters."""
    params = {param.name for delta in rule.deltas for param in (*delta.form.params, *delta.params)}
    return params | {delta.name for delta in rule.deltas}


def _identities(rule: Rule) -> Iterator[Diagnostic]:
    told: set[tuple[object, str]] = set()
    for case in rule.tests:
        for delta in rule.deltas if case.identity else ():
            why = changes_outputs(delta, {**rule.values, **case.hyper})
            place = (case.span_at("identity"), delta.name)
            if why is not None and place not in told:
                told.add(place)
                message = f"test `{case.name}` says `identity: true`, but row `{delta.name}` changes the outputs: {why}"
                help = "start a last factor with `init: zeros`, or say `identity: false`"
                yield Diagnostic("W020", message, place[0], help, "warning")
