"""Several deltas on one tap: their order, what the plan says of them, and one method twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import peftc
from composition.conftest import Planner, logits, rendered, scramble
from peftc import driver
from peftc.diagnostics import Collector
from peftc.lang.loader import parse_rule
from peftc.lang.order import ordered
from peftc.lang.rule import Rule
from peftc.lang.source import compose
from peftc.lang.tree import MappingNode
from peftc.planning.overlaps import overlaps

Directory = Callable[[str], Path]


def rule_of(rows: str) -> Rule:
    return parse_rule(f"peftc: 1\nname: t\nhyper: {{r: 2}}\ndeltas:\n{rows}", "mine.yaml")


def order_of(wishes: dict[str, dict[str, list[str]]]) -> tuple[list[str], Collector]:
    text = "".join(f"{name}: {{before: {row['before']}, after: {row['after']}}}\n" for name, row in wishes.items())
    collector = Collector()
    tree = compose(text, "t.yaml", collector)
    assert isinstance(tree, MappingNode)
    return ordered({name: node for name, (_, node) in tree.entries.items()}, collector), collector


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_order_is_the_first_by_file_of_all_that_hold(data: Any) -> None:
    names = "abcde"[: data.draw(st.integers(2, 5))]
    wishes = {
        name: {
            key: data.draw(st.lists(st.sampled_from(sorted({*names} - {name})), max_size=2))
            for key in ("before", "after")
        }
        for name in names
    }
    pairs = {(name, other) for name, row in wishes.items() for other in row["before"]}
    pairs |= {(other, name) for name, row in wishes.items() for other in row["after"]}
    holding = [o for o in itertools.permutations(names) if all(o.index(a) < o.index(b) for a, b in pairs)]
    found, collector = order_of(wishes)
    if holding:
        assert not collector.errors
        assert tuple(found) == min(holding)
    else:
        assert [error.code for error in collector.errors] == ["E051"]


def test_rows_are_composed_in_the_order_asked_for(directory: Directory) -> None:
    scale = "  scale: {at: ffn, modify: out, insert: sequential, form: 2 * x, compose: dhSCALE}\n"
    squash = "  squash: {at: ffn, modify: out, insert: sequential, form: tanh(x), compose: dhSQUASH}\n"
    base = transformers.BertForSequenceClassification.from_pretrained(directory("bert")).eval()
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "scale first": lambda h: torch.tanh(2 * h), "squash first": lambda h: 2 * torch.tanh(h)
    }  # fmt: skip
    expected = {}
    for name, function in change.items():
        hooks = [
            block.output.dense.register_forward_hook(lambda module, given, h, function=function: function(h))
            for block in base.bert.encoder.layer
        ]
        expected[name] = logits(base)
        for hook in hooks:
            hook.remove()
    assert (expected["scale first"] - expected["squash first"]).abs().max() > 1e-3
    for wish, first in (("", "scale first"), (", after: squash", "squash first"), (", before: squash", "scale first")):
        model = peftc.apply(rule_of(scale.replace("SCALE", wish) + squash.replace("SQUASH", "")), directory("bert"))
        assert (logits(model) - expected[first]).abs().max() < 1e-12
    model = peftc.apply(
        rule_of(scale.replace("SCALE", "") + squash.replace("SQUASH", ", before: [scale]")), directory("bert")
    )
    assert (logits(model) - expected["squash first"]).abs().max() < 1e-12
    assert [d.name for d in parse_rule(model.surgery.rule.text, "again.yaml").deltas] == ["squash", "scale"]


def test_entries_of_rewrite_follow_the_rows_but_for_what_they_ask(directory: Directory) -> None:
    row = "deltas:\n  squash: {at: ffn, modify: out, insert: sequential, form: tanh(x), compose: dhROW}\n"
    entry = "rewrite:\n  scale: {at: ffn, set: {out: 2 * out}ENTRY}\n"
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "row first": lambda h: 2 * torch.tanh(h), "entry first": lambda h: torch.tanh(2 * h)
    }  # fmt: skip
    expected = {}
    for name, function in functions.items():
        base = transformers.BertForSequenceClassification.from_pretrained(directory("bert")).eval()
        for block in base.bert.encoder.layer:
            block.output.dense.register_forward_hook(lambda module, given, h, function=function: function(h))
        expected[name] = logits(base)
    assert (expected["row first"] - expected["entry first"]).abs().max() > 1e-3
    for of_row, of_entry, first in (
        ("", "", "row first"), ("", ", after: squash", "row first"), (", before: [scale]", "", "row first"),
        (", after: scale", "", "entry first"), ("", ", before: squash", "entry first"),
    ):  # fmt: skip
        text = "peftc: 1\nname: t\n" + row.replace("ROW", of_row) + entry.replace("ENTRY", of_entry)
        model = peftc.apply(parse_rule(text, "mine.yaml"), directory("bert"))
        assert (logits(model) - expected[first]).abs().max() < 1e-12
        names = ["squash", "scale"] if first == "row first" else ["scale", "squash"]
        assert [d.name for d in parse_rule(model.surgery.rule.text, "again.yaml").deltas] == names


def test_plan_tells_every_tap_of_an_entry_that_another_changes(plan: Planner) -> None:
    text = "peftc: 1\nname: t\nhyper: {r: 2}\ndeltas:\n  a: {at: linear, modify: out, form: low_rank}\n"
    text += 'rewrite:\n  b: {at: attention, where: {layers: [0]}, set: {q: 2 * q, k: 2 * k, "heads?": 2 * heads}}\n'
    found = [(overlap.deltas, overlap.tap) for overlap in overlaps(plan(parse_rule(text, "mine.yaml"), "bert"))]
    assert found == [(("a", "b"), "linear.out = attention.q"), (("a", "b"), "linear.out = attention.k")]


def test_plan_tells_which_deltas_meet_on_one_value(plan: Planner, directory: Directory, tmp_path: Path) -> None:
    rows = (
        "  a: {at: ffn, modify: out, form: bottleneck, after: b}\n"
        "  b: {at: ffn, modify: out, form: bottleneck, where: {layers: first 2}}\n"
        "  c: {at: linear, modify: out, form: low_rank, where: {role: down, layers: [0]}}\n"
        "  d: {at: attention, modify: [q, v], form: low_rank}\n"
    )
    found = [(overlap.deltas, overlap.tap, len(overlap.places)) for overlap in overlaps(plan(rule_of(rows), "bert"))]
    assert found == [(("b", "a", "c"), "ffn.out = linear.out", 1), (("b", "a"), "ffn.out", 1)]
    assert overlaps(plan(rule_of(rows.splitlines(keepends=True)[3]), "bert")) == []
    file = tmp_path / "mine.yaml"
    file.write_text("peftc: 1\nname: t\nhyper: {r: 2}\ndeltas:\n" + rows, encoding="utf-8")
    report = driver.plan(file, directory("bert"))
    assert "overlap: b, then a, then c on ffn.out = linear.out at 1 site" in rendered(report)
    assert report.to_json()["overlaps"][1]["deltas"] == ["b", "a"]


def test_one_method_twice_with_two_ranks_on_two_parts_of_the_model(directory: Directory, tmp_path: Path) -> None:
    import peft

    row = "at: attention, modify: [q, v], form: low_rank"
    rows = (
        f"  low: {{{row}, where: {{layers: first 2}}}}\n  high: {{{row}, where: {{layers: last 2}}, with: {{r: 5}}}}\n"
    )
    ours = scramble(peftc.apply(rule_of(rows), directory("llama")))
    base = transformers.LlamaForCausalLM.from_pretrained(directory("llama"), dtype=torch.float64)
    ranks = {rf"layers\.{layer}\..*": 5 for layer in (2, 3)}
    config = peft.LoraConfig(
        r=2, lora_alpha=2, rank_pattern=ranks, alpha_pattern=ranks, target_modules=["q_proj", "v_proj"]
    )
    theirs = peft.get_peft_model(base, config).double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                layer = int(name.split("layers.")[1].split(".")[0])
                place = f"model.layers.{layer}.self_attn.peftc.{'low' if layer < 2 else 'high'}"
                tap, which = name.split("_proj")[0][-1], "A" if "lora_A" in name else "B"
                parameter.copy_(ours.get_parameter(f"{place}.{tap}.{which}"))
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-12
    ours.save_pretrained(tmp_path / "out")
    driver.merge(tmp_path / "out", tmp_path / "merged", export={"hf"})
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(theirs)).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["b", "'b'", "[b]"])
def test_a_word_or_a_list_says_the_same(name: str) -> None:
    rows = (
        f"  a: {{at: ffn, modify: out, form: relu(x), after: {name}}}\n  b: {{at: ffn, modify: out, form: relu(x)}}\n"
    )
    assert [delta.name for delta in rule_of(rows).deltas] == ["b", "a"]
