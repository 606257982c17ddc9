"""Every rule of the library holds tests, they hold, and their counts are those of transformers' module trees."""

from __future__ import annotations

import pytest

from peftc.checking.rule_test_formats import diagnostics
from peftc.checking.rule_tests import run_tests
from peftc.lang.loader import list_rules, load_rule
from rule_tests.tree import ADAPTED, tree

RULES = [rule.name for rule in list_rules()]
ROLES = ("encoder", "decoder", "encoder-decoder")


@pytest.mark.parametrize("name", RULES)
def test_every_test_of_the_rule_is_validated(name: str) -> None:
    results = list(run_tests(load_rule(name), name))
    told = [told.render() for result in results for told in diagnostics(result)]
    assert not told, "\n\n".join(told)
    assert {result.outcome for result in results} == {"validated"}


@pytest.mark.parametrize("name", RULES)
def test_rule_says_what_it_does_on_all_three_kinds_of_model(name: str) -> None:
    cases = load_rule(name).tests
    assert {case.family for case in cases} >= set(ROLES)
    for role in ROLES:
        said = [case for case in cases if case.family == role]
        refused = any(case.error for case in said)
        assert refused or any(case.trained is not None and case.identity is not None for case in said), role
        assert refused or name == "full" or any(case.sites and case.fold for case in said), role


@pytest.mark.parametrize("name", sorted(ADAPTED))
def test_counts_of_the_rule_are_those_of_the_module_tree(name: str) -> None:
    rule = load_rule(name)
    cases = [case for case in rule.tests if case.family in ROLES and case.trained is not None]
    assert cases
    for case in cases:
        assert case.trained == ADAPTED[name](tree(case.family), {**rule.values, **case.hyper}), case.label
