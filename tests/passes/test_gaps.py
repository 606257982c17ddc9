"""A delta that reaches some layers of a stack says so in the plan; one that names its layers does not."""

from __future__ import annotations

import dataclasses

from peftc.checking.families import traced
from peftc.lang.loader import load_rule
from peftc.planning.gaps import Gap, gaps
from peftc.planning.plan import make_plan


def test_layers_without_a_site_are_a_stated_fact() -> None:
    program = traced("decoder").program()
    rule = load_rule("mam", {"l": 3, "r": 4})
    assert gaps(make_plan(rule, program)) == []
    program.sites = tuple(site for site in program.sites if (site.kind, site.layer) != ("attention", 0))
    (gap,) = gaps(make_plan(rule, program))
    assert gap == Gap("prefix", ("attention",), "decoder", (1,), 2)
    assert gap.describe() == "prefix is at layer 1 of the 2 of the decoder; the others have no attention"


def test_a_row_that_names_its_layers_has_no_gap() -> None:
    program, rule = traced("decoder").program(), load_rule("pfeiffer", {"r": 4})
    where = dataclasses.replace(rule.deltas[0].where, path=("*layers.1*",))
    narrowed = dataclasses.replace(rule, deltas=(dataclasses.replace(rule.deltas[0], where=where),))
    plan = make_plan(narrowed, program)
    assert {edit.site.layer for edit in plan.edits} == {1} and gaps(plan) == []
