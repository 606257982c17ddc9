"""Shapes without a model: what must be told, in the row's terms, and what must not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from peftc.checking.check import check
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.lang.forms import parse_form
from peftc.lang.library import form_names, load_form, rule_files
from peftc.lang.loader import load_rule, parse_rule
from peftc.lang.op_shapes import OP_SHAPES
from peftc.lang.ops import LIBRARY_OPS
from peftc.lang.shapes.check import check_row
from peftc.lang.shapes.rules import RULES
from peftc.lang.shapes.signature import signature

HEAD = "peftc: 1\nname: t\nhyper: {r: 8, m: 4, k: 8, one: 1, l: 30, s: 4.0, b: true}\ndeltas:\n  a: "


def told(row: str) -> list[Diagnostic]:
    """Errors, or the warnings where there is no error."""
    try:
        rule = parse_rule(f"{HEAD}{row}\n", "t.yaml")
    except PeftcError as error:
        return list(error.diagnostics)
    return [found for delta in rule.deltas for found in check_row(delta, rule.hyper)]


def test_every_op_has_its_shapes_and_a_rule() -> None:
    assert set(OP_SHAPES) == set(LIBRARY_OPS)
    for name in OP_SHAPES.keys() - RULES.keys():
        low, high = LIBRARY_OPS[name].arity
        assert low == high == len(signature(OP_SHAPES[name]).operands)


@pytest.mark.parametrize("name", sorted(rule_files()))
def test_rules_of_the_library_have_no_misfit(name: str) -> None:
    rule = load_rule(name)
    assert [found.render() for delta in rule.deltas for found in check_row(delta, rule.hyper)] == []


@pytest.mark.parametrize("name", form_names())
def test_forms_of_the_library_have_no_misfit(name: str) -> None:
    assert load_form(name)


FITTING = [
    # a size of 1 broadcasts, by its number and by a hyperparameter that is 1
    '{at: ffn, modify: out, form: "x * g", params: {g: {shape: [one], init: ones}}}',
    '{at: attention, modify: out, form: "x * g", params: {g: {shape: [one, 1], init: ones}}}',
    # widths that may be equal are left to the model: a hyperparameter by its number, d_in as d_model, heads of a head
    '{at: ffn, modify: out, form: "linear(x, W)", params: {W: {shape: [d_out, 384], init: zeros}}}',
    '{at: attention, modify: q, form: "linear(x, W)", params: {W: {shape: [heads * head_dim, d_model], init: zeros}}}',
    '{at: attention, modify: out, form: "linear(x, W)", params: {W: {shape: [d_in, d_out], init: zeros}}}',
    '{at: ffn, modify: out, form: "flatten(unflatten(x, -1, [m, k]), -2, -1)"}',
    # where the rule ties the names together itself
    '{at: linear, where: {if: d_in == d_out}, modify: out, form: "identity(x)"}',
    '{at: linear, modify: out, form: "x if d_in == d_out else linear(x, W)", '
    "params: {W: {shape: [d_out, d_in], init: zeros}}}",
    # arithmetic on sizes is exact
    '{at: linear, modify: weight, form: "kron(A, B)", '
    "params: {A: {shape: [k, k], init: zeros}, B: {shape: [d_out / k, d_in / k], init: zeros}}}",
    '{at: ffn, modify: out, form: "linear(concat(linear(x, A), linear(x, B)), C)", '
    "params: {A: {shape: [r, d_in], init: zeros}, B: {shape: [m, d_in], init: zeros}, "
    "C: {shape: [d_out, m + r], init: zeros}}}",
    # heads
    '{at: attention, modify: heads, form: "split_heads(linear(x, W), heads)", '
    "params: {W: {shape: [heads * head_dim, d_in], init: zeros}}}",
    '{at: attention, modify: concat, insert: heads, form: "merge_heads(x)"}',
    '{at: attention, modify: k, form: "linear(x, W)", params: {W: {shape: [d_out, d_in], init: zeros}}}',
    # absent parameters where they are not read, and as the bias of a linear
    '{at: ffn, modify: out, form: "x + c if not b else x", params: {c: {shape: [d_in], init: zeros, if: not b}}}',
    '{at: ffn, modify: out, form: "linear(x, W, c)", '
    "params: {W: {shape: [d_out, d_in], init: zeros}, c: {shape: [d_out], init: zeros, if: not b}}}",
]


@pytest.mark.parametrize("row", FITTING)
def test_what_fits_or_may_fit_is_left_alone(row: str) -> None:
    assert [found.render() for found in told(row)] == []


def test_form_of_the_library_is_told_at_the_row_and_in_its_terms() -> None:
    (found,) = told("{at: norm, modify: weight, insert: sequential, form: rotation, with: {b: 2 * m}}")
    assert found.message == "form `rotation`: `unflatten(h, 1, [d_in // b, b])` does not fit: h is [d_out]"
    assert found.help == "h has 1 axis, so no axis 1"
    assert (str(found.span), found.span.text[found.span.col - 1 : found.span.end_col - 1] if found.span else "") == (
        "t.yaml:5:59",
        "rotation",
    )
    (found,) = told("{at: attention, modify: out, form: prompt, with: {l: 2 * m}}")
    assert found.message == "`h + dh` does not fit: h is [B, S, d_out] but dh is [2 * m, d_model]"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{at: ffn, modify: out, form: "linear(linear(x, A), B)", '
            "params: {A: {shape: [r, d_in], init: zeros}, B: {shape: [d_out, k], init: zeros}}}",
            "`linear(linear(x, A), B)` fits only where r is k",
        ),
        (
            '{at: linear, modify: out, form: "linear(x, A)", params: {A: {shape: [d_out, d_out], init: zeros}}}',
            "`linear(x, A)` fits only where d_in is d_out",
        ),
        ('{at: linear, modify: out, form: "identity(x)"}', "`h + dh` fits only where d_out is d_in"),
    ],
)
def test_what_fits_by_chance_is_warned_of(row: str, message: str) -> None:
    assert [(found.code, found.severity, found.message) for found in told(row)] == [("W006", "warning", message)]


def test_set_value_decides_what_fits() -> None:
    row = (
        '{at: ffn, modify: out, form: "linear(linear(x, A), B)", '
        "params: {A: {shape: [r, d_in], init: zeros}, B: {shape: [d_out, m], init: zeros}}}"
    )
    with pytest.raises(PeftcError, match=r"r = 8 and m = 4 differ"):
        parse_rule(f"{HEAD}{row}\n", "t.yaml")
    assert parse_rule(f"{HEAD}{row}\n", "t.yaml", {"m": 8})


def test_check_tells_what_fits_by_chance(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(f'{HEAD}{{at: linear, modify: out, form: "s * x"}}\n', encoding="utf-8")
    (checked,) = check([str(file)]).files
    assert "W006" in [found.code for found in checked.diagnostics]


def test_form_by_itself_is_checked_with_the_sizes_it_leaves_open() -> None:
    text = """\
peftc-form: 1
name: f
params: {A: {shape: [r, d_in], init: zeros}, B: {shape: [d_out, e], init: zeros}}
dh: linear(linear(x, A), B)
"""
    with pytest.raises(PeftcError, match="r and e are equal by coincidence only"):
        parse_form(text, "f.yaml")


def test_rule_file_that_grows_sizes_without_end_is_read_in_no_time() -> None:
    lets = ", ".join(f"a{i + 1}: a{i} * a{i} + a{i} // 3 + r" for i in range(30))
    row = f'{{at: ffn, modify: out, let: {{a0: r + m + k, {lets}}}, form: "a30 * x"}}'
    began = time.process_time()
    told(row.replace("let: {", "form: {let: {").replace(', form: "a30 * x"}', ', expr: "reshape(x, [a30, -1])"}}'))
    assert time.process_time() - began < 1
