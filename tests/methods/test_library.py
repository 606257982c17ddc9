"""Every rule of the library is held to something that was written without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference.methods import METHODS

from methods.test_against_formula import CASES as FORMULAS
from peftc.lang.loader import list_rules

RULES = Path(__file__).parents[2] / "rules"


def test_every_rule_of_the_library_has_a_reference() -> None:
    pytest.importorskip("peft")
    from methods import test_starts as starts
    from methods.test_against_peft import CASES
    from methods.test_prompts_against_peft import RULES as PROMPTS

    held = {case.rule for case in CASES.values()} | set(FORMULAS) | set(METHODS) | set(PROMPTS)
    held |= {
        *starts.RULES,
        *starts.OTHERS,
        "adapter_fusion",
        "lora_mix",
        "zflora",
        "experts_lora",
    }  # two in runtime/, one each in test_carried and test_experts
    assert held == {file.stem for file in RULES.glob("*.yaml")}


def test_every_rule_says_what_it_is_and_where_it_comes_from() -> None:
    for rule in list_rules():
        assert rule.doc and rule.paper, rule.name
        assert all(delta.form.doc and delta.form.paper for delta in rule.deltas if delta.form.name), rule.name
