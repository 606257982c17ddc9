"""How the results of rule tests are written: for people, as JSON, or as JUnit XML for CI.

$ peftc test mine.yaml --format junit > rule-tests.xml
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from peftc.diagnostics import Diagnostic

if TYPE_CHECKING:
    from peftc.checking.rule_tests import Finding, Result

OUTCOMES = ("validated", "noisy", "missing", "failed", "untested")


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many cases came to each outcome."""
    return {outcome: sum(result.outcome == outcome for result in results) for outcome in OUTCOMES}


def summary(results: Sequence[Result]) -> str:
    """One line, such as `12 tests of 3 rules: 11 validated, 1 noisy`."""
    tests = sum(result.outcome != "untested" for result in results)
    rules = len({result.rule for result in results})
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts(results).items() if count)
    return f"{_counted(tests, 'test')} of {_counted(rules, 'rule')}: {told or 'nothing to run'}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def diagnostics(result: Result) -> list[Diagnostic]:
    """What does not hold, as errors at their places."""
    return [
        Diagnostic("E060", f"{finding.outcome}: test `{result.case}` says {finding.expected}", finding.span,
                   f"found: {finding.found}")
        for finding in result.findings
    ]  # fmt: skip


def as_json(results: Sequence[Result], mistakes: Sequence[Diagnostic]) -> str:
    """One object with the counts, `tests` (each with its findings) and `mistakes` of rules that could not be read."""
    tests = [
        {
            "rule": result.rule,
            "test": result.case or None,
            "outcome": result.outcome,
            "seconds": round(result.seconds, 3),
            "findings": [_finding(finding) for finding in result.findings],
        }
        for result in results
    ]
    whole = {**counts(results), "tests": tests, "mistakes": [told.to_json() for told in mistakes]}
    return json.dumps(whole, indent=2, ensure_ascii=False)


def _finding(finding: Finding) -> dict[str, Any]:
    span = finding.span
    return {
        "outcome": finding.outcome,
        "expectation": finding.key,
        "expected": finding.expected,
        "found": finding.found,
        "file": span.file if span else None,
        "line": span.line if span else None,
        "col": span.col if span else None,
    }


def as_junit(results: Sequence[Result], mistakes: Sequence[Diagnostic]) -> str:
    """JUnit XML: a suite for each rule; noisy, missing and failed are failures, an untested rule is skipped."""
    root = ElementTree.Element("testsuites")
    for rule in dict.fromkeys(result.rule for result in results):
        own = [result for result in results if result.rule == rule]
        bad = sum(bool(result.findings) for result in own)
        skipped = sum(result.outcome == "untested" for result in own)
        suite = _suite(root, rule, len(own), failures=bad, skipped=skipped, errors=0)
        for result in own:
            _case(suite, result)
    for told in mistakes:
        file = told.span.file if told.span else ""
        suite = _suite(root, file or "rules", 1, failures=0, skipped=0, errors=1)
        case = ElementTree.SubElement(suite, "testcase", classname=file, name="the rule is readable", time="0")
        error = ElementTree.SubElement(case, "error", type=told.code, message=told.message)
        error.text = told.render()
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _suite(root: ElementTree.Element, name: str, tests: int, **numbers: int) -> ElementTree.Element:
    attributes = {"name": name, "tests": str(tests), **{key: str(number) for key, number in numbers.items()}}
    return ElementTree.SubElement(root, "testsuite", attributes)


def _case(suite: ElementTree.Element, result: Result) -> None:
    name = result.case or "untested"
    case = ElementTree.SubElement(suite, "testcase", classname=result.rule, name=name, time=f"{result.seconds:.3f}")
    if result.outcome == "untested":
        ElementTree.SubElement(case, "skipped", message="the rule has no tests")
    if result.findings:
        told = diagnostics(result)
        failure = ElementTree.SubElement(case, "failure", type=result.outcome, message=told[0].message)
        failure.text = "\n\n".join(diagnostic.render() for diagnostic in told)
