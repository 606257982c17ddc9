"""Budgets: the value found is the largest that fits, it is told, stored, and never found anew."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peftc
from composition.conftest import Planner, inputs, logits, rendered
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.lang.loader import load_rule, parse_rule
from peftc.lang.rule import Rule

Directory = Callable[[str], Path]
ROW = "deltas: {a: {at: ffn, modify: out, form: bottleneck}}\n"


def rule_of(hyper: str, rows: str = ROW, **sets: object) -> Rule:
    return parse_rule(f"peftc: 1\nname: t\nhyper: {{{hyper}}}\n{rows}", "mine.yaml", sets)


def refused(plan: Planner, rule: Rule, model: str = "bert") -> str:
    with pytest.raises(PeftcError) as raised:
        plan(rule, model)
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "E052"
    assert diagnostic.span is not None
    assert diagnostic.help is not None
    return diagnostic.message


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_value_is_the_largest_that_fits(plan: Planner, data: Any) -> None:
    name = data.draw(st.sampled_from(["lora", "houlsby", "pa_ffn", "dora", "loha"]))
    model = data.draw(st.sampled_from(["bert", "llama", "bart"]))
    count = data.draw(st.integers(4_000, 60_000))
    written = data.draw(st.sampled_from([f"{{budget: {count}}}", "PERCENT"]))
    base = plan(load_rule(name, {"r": 1}), model).base_count
    percent = f"{100 * count / base:.3f}"
    rule = f"peftc: 1\nextends: {name}\nhyper: {{r: {written.replace('PERCENT', f'{{budget: {percent}%}}')}}}\n"
    limit = count if written != "PERCENT" else math.floor(base * int(percent.replace(".", "")) / 100_000)
    found = plan(parse_rule(rule, "mine.yaml"), model)
    value = found.rule.values["r"]
    assert isinstance(value, int)
    trained = plan(load_rule(name, {"r": value}), model).trained_count
    following = plan(load_rule(name, {"r": value + 1}), model).trained_count
    assert trained == found.trained_count <= limit < following
    assert found.budget is not None
    assert (found.budget.value, found.budget.trained, found.budget.following) == (value, trained, following)
    assert (found.budget.limit, found.budget.base) == (limit, base)


def test_bounds_hold_and_what_lies_beyond_them_is_not_told(plan: Planner) -> None:
    found = plan(rule_of("r: {budget: 90%, min: 2, max: 5}"), "bert")
    assert found.rule.values == {"r": 5}
    assert found.budget is not None
    assert found.budget.following is None
    assert "r = 6 is not admitted" in found.budget.describe()
    assert "r = 2 already trains" in refused(plan, rule_of("r: {budget: 640, min: 2, max: 5}"))


def test_value_that_is_refused_for_another_reason_does_not_fit(plan: Planner) -> None:
    found = plan(rule_of("r: {budget: 90%}", ROW.replace("out,", "out, where: {if: r < 7},")), "bert")
    assert found.rule.values == {"r": 6}


def test_budget_that_cannot_be_spent_is_told_with_the_figures(plan: Planner) -> None:
    base = plan(rule_of("r: 1"), "bert").base_count
    message = refused(plan, rule_of("r: {budget: 0.1%}"))
    first = plan(rule_of("r: 1"), "bert").trained_count
    allowed = f"allows {math.floor(base / 1000):,} of {base:,} parameters"
    assert message == f"the budget of `r`, 0.1%, {allowed}; r = 1 already trains {first:,}"
    free = "deltas: {a: {at: ffn, modify: out, form: r * x, compose: h}}\n".replace("compose: h", "compose: h + dh")
    assert "does not bound it" in refused(plan, rule_of("r: {budget: 50%}", free))
    sizes = "form: g * x, insert: sequential, params: {g: {shape: [d_out], init: zeros, if: r < 3}}"
    shrinking = f"deltas: {{a: {{at: ffn, modify: out, {sizes.replace('g * x', 'x if g == None else g * x')}}}}}\n"
    shrinking = shrinking.replace("x if g == None else g * x", "x if r >= 3 else g * x")
    assert "fewer parameters train as `r` grows" in refused(plan, rule_of("r: {budget: 50%, max: 9}", shrinking))


def test_new_head_counts_and_so_does_what_the_rule_trains(plan: Planner) -> None:
    bare = plan(rule_of("r: {budget: 20000}"), "bert")
    headed = plan(rule_of("r: {budget: 20000}"), "bert", fresh={"bert.pooler.dense.weight"})
    assert headed.trained_count <= 20_000 < bare.trained_count + 32 * 32
    assert headed.rule.values["r"] < bare.rule.values["r"]
    trained = plan(rule_of("r: {budget: 20000}", ROW + 'train: ["bert.pooler.dense.weight"]\n'), "bert")
    assert trained.rule.values == headed.rule.values


def test_values_of_single_layers_stay_and_the_rest_is_found(plan: Planner) -> None:
    found = plan(rule_of("r: {budget: 5000, layers: {0: 3}}"), "bert")
    ranks = [edit.statics["r"] for edit in found.edits]
    assert ranks[0] == 3
    assert set(ranks[1:]) == {found.rule.values["r"]}
    assert (
        found.trained_count
        <= 5000
        < plan(rule_of(f"r: {{default: {ranks[1] + 1}, layers: {{0: 3}}}}"), "bert").trained_count
    )


def test_set_gives_a_value_or_another_budget_to_any_whole_number(plan: Planner) -> None:
    assert plan(rule_of("r: {budget: 0.1%}", r=16), "bert").rule.values == {"r": 16}
    for rule in (rule_of("r: {budget: 0.1%}", r="5%"), rule_of("r: 8", r="5 %"), rule_of("r: {default: 8}", r="5%")):
        assert plan(rule, "bert").rule.values == plan(rule_of("r: {budget: 5%}"), "bert").rule.values
        assert "5%" in rule.text
    assert plan(load_rule("lora", {"r": "3%"}), "llama").percent <= 3
    with pytest.raises(PeftcError, match="`alpha` must be a number"):
        load_rule("lora", {"alpha": "3%"})


def test_text_holds_the_value_and_nothing_else_changes(plan: Planner) -> None:
    text = "peftc: 1\nname: t\nhyper:\n  r:   # rank\n    budget:  5%   # of the base\n    min: 2\n" + ROW
    found = plan(parse_rule(text, "mine.yaml"), "bert").rule
    value = found.values["r"]
    assert found.text == text.replace("budget:  5% ", f"default:  {value} ")
    assert parse_rule(found.text, "again.yaml").values == {"r": value}


def test_delta_directory_holds_the_value_and_loads_as_it_was(directory: Directory, tmp_path: Path) -> None:
    report = driver.apply("lora", directory("llama"), tmp_path / "out", sets={"r": "4%"})
    budget = report.to_json()["budget"]
    assert f"{budget['hyper']} = {budget['value']}: {budget['trained']:,} parameters" in rendered(report)
    assert f"r = {budget['value'] + 1} would be {budget['following']:,}" in rendered(report)
    stored = (tmp_path / "out" / "rule.yaml").read_text(encoding="utf-8")
    assert f"r: {{default: {budget['value']}, min: 1" in stored
    assert json.loads((tmp_path / "out" / "peftc.json").read_text())["budget"]["budget"] == "4%"
    model = peftc.load(tmp_path / "out")
    assert model.surgery.plan.trained_count == budget["trained"]
    assert model.surgery.plan.budget is None


def test_trace_for_other_inputs_uses_the_value_found(directory: Directory) -> None:
    model = peftc.apply(rule_of("r: {budget: 8%}"), directory("bert"), head="sequence-classification", num_labels=7)
    value = model.surgery.rule.values["r"]
    assert model.surgery.rule.budgeted is None
    logits(model)
    loss = model(**inputs(), labels=torch.tensor([0, 1, 1]), token_type_ids=torch.zeros(3, 9, dtype=torch.long)).loss
    loss.backward()
    down = [p for n, p in model.named_parameters() if n.endswith("W_down")]
    assert {p.shape[0] for p in down} == {value}
    assert all(p.grad is not None for p in down)
    assert len(model.surgery.programs) > 1
    assert all(set(model.surgery.plan.parameters) <= set(p.delta_parameters) for p in model.surgery.programs.values())
