"""`peftc check` on tests inside rules: rules and names that are not there, identities that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftc.checking.check import check
from peftc.checking.rule_tests import run_tests
from peftc.diagnostics import Diagnostic
from peftc.lang.inits import is_draw
from peftc.lang.loader import list_rules, load_rule, parse_rule
from peftc.lang.rule import Rule
from peftc.lang.start import changes_outputs

HEAD = "peftc: 1\nname: t\nhyper: {r: 4}\ndeltas:\n"
LOW = "  low: {at: attention, modify: [q, v], form: low_rank}\n"


def told(tmp_path: Path, rows: str, case: str) -> list[Diagnostic]:
    file = tmp_path / "t.yaml"
    file.write_text(f"{HEAD}{rows}tests:\n  case: {{family: bert, {case}}}\n", encoding="utf-8")
    (checked,) = check([str(file)]).files
    return [diagnostic for diagnostic in checked.diagnostics if diagnostic.code != "W003"]  # not each row reads r


@pytest.mark.parametrize(
    ("case", "code", "at", "words"),
    [
        ("same_as: loar", "E018", "loar", "did you mean `lora`?"),
        ("same_as: {rule: there.yaml}", "E018", "there.yaml", "no rule file"),
        ("same_as: {rule: lora, hyper: {q: 3}}", "E015", "lora", "`--set q`"),
        ("same_as: {rule: lora, map: {lo: lora}}", "E061", "{lo: lora}", "no row or parameter `lo` here"),
        ("same_as: {rule: lora, map: {low: lo}}", "E061", "{low: lo}", "no row or parameter `lo` in `lora`"),
    ],
)
def test_wrong_comparison_is_told_at_its_word(tmp_path: Path, case: str, code: str, at: str, words: str) -> None:
    (found,) = told(tmp_path, LOW, case)
    assert found.code == code
    assert found.span.text[found.span.col - 1 : found.span.end_col - 1] == at
    assert words in f"{found.message} {found.help}"


def test_right_comparison_is_clean(tmp_path: Path) -> None:
    assert told(tmp_path, LOW, "same_as: {rule: lora, hyper: {r: 4}, map: {low: lora, A: A}}") == []


SURE = {
    "two random factors": "{at: ffn, modify: out, form: bottleneck_bert}",
    "a random vector": "{at: ffn, modify: out, form: v + 0, params: {v: {shape: [d_out], init: normal(0.1)}}}",
    "a prefix": "{at: attention, modify: heads, form: prefix, with: {l: 3}, compose: gate}",
    "attention added": "{at: attention, modify: heads, form: prefix, with: {l: 3}, compose: h + dh}",
    "a prompt": "{at: model, modify: embeddings, insert: sequential, form: prompt, with: {l: 3}, compose: prepend}",
    "h replaced": "{at: ffn, modify: out, form: 'linear(x, W)', params: {W: {shape: [d_out, d_in], init: normal(1.0)}},"
    " compose: dh}",
    "a subspace": "{at: block, modify: out, insert: sequential, form: subspace}",
}
NOT_SURE = {
    "a zero factor": "{at: ffn, modify: out, form: bottleneck}",
    "a gate of zero": "{at: attention, modify: heads, form: prefix, with: {l: 3},"
    " params: {g: {shape: [heads, 1, 1], init: zeros}}, compose: h + g * dh}",
    "terms that cancel": "{at: ffn, modify: out, form: 'linear(x, W) - linear(x, W)',"
    " params: {W: {shape: [d_out, d_in], init: normal(1.0)}}}",
    "a factor that divides itself": "{at: ffn, modify: out, form: v / v,"
    " params: {v: {shape: [d_out], init: normal(1.0)}}, compose: h * dh}",
    "a gain of one": "{at: ffn, modify: out, form: gain, compose: h * dh}",
    "a scale of zero": "{at: ffn, modify: out, form: bottleneck_bert, compose: h + 0 * dh}",
    "a parameter that is not there": "{at: ffn, modify: out, form: low_rank_bias, with: {bias: false}}",
    "reflections in pairs": "{at: linear, where: {role: q}, modify: weight, insert: sequential, form: reflections,"
    " compose: dh}",
    "a rotation of nothing": "{at: linear, where: {role: q}, modify: weight, insert: sequential, form: rotation,"
    " with: {b: 8}, compose: dh}",
}


@pytest.mark.parametrize("name", SURE)
def test_row_that_surely_changes_the_outputs_is_doubted_and_does(tmp_path: Path, name: str) -> None:
    (found,) = told(tmp_path, f"  a: {SURE[name]}\n", "identity: true")
    assert (found.code, found.severity) == ("W020", "warning")
    assert found.span.text[found.span.col - 1 : found.span.end_col - 1] == "true"
    (result,) = run_tests(load_rule(tmp_path / "t.yaml"), str(tmp_path / "t.yaml"))
    assert [finding.key for finding in result.findings] == ["identity"]


@pytest.mark.parametrize("name", NOT_SURE)
def test_row_that_may_start_as_the_base_is_not_doubted(tmp_path: Path, name: str) -> None:
    assert told(tmp_path, f"  a: {NOT_SURE[name]}\n", "identity: true") == []


@pytest.mark.parametrize("rule", list_rules(), ids=lambda rule: rule.name)
def test_library_is_doubted_only_where_its_tests_say_that_it_changes_the_outputs(rule: Rule) -> None:
    for case in rule.tests:
        values = {**rule.values, **case.hyper}
        sure = [delta.name for delta in rule.deltas if changes_outputs(delta, values)]
        assert not sure or case.identity is not True, (case.label, sure)
        if case.identity is False and not starts_from_weights(rule):
            assert sure, case.label


def starts_from_weights(rule: Rule) -> bool:
    """Whether something starts as a function of weights, of which nothing is known without them."""
    params = (param for delta in rule.deltas for param in (*delta.form.params, *delta.params))
    return any(not is_draw(param.init.tree) for param in params)


def test_hyperparameters_of_the_case_decide() -> None:
    text = f"{HEAD}  a: {{at: ffn, modify: out, form: bottleneck_bert, with: {{bias: false}}, compose: h + s * dh}}\n"
    (delta,) = parse_rule(text.replace("{r: 4}", "{r: 4, s: 1.0}"), "t.yaml").deltas
    assert changes_outputs(delta, {"r": 4, "s": 1.0})
    assert changes_outputs(delta, {"r": 4, "s": 0.0}) is None
