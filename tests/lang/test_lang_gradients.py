"""Parameters that no gradient reaches, told from the expressions; what a gradient may reach is left alone."""

from __future__ import annotations

import pytest

from peftc.diagnostics import PeftcError
from peftc.lang.library import rule_files
from peftc.lang.loader import load_rule, parse_rule

HEAD = "peftc: 1\nname: t\nhyper: {r: 4, act: relu, s: 1.0}\ndeltas:\n  a: "


def told(row: str) -> list[str]:
    try:
        parse_rule(f"{HEAD}{row}\n", "t.yaml")
    except PeftcError as error:
        return [f"{found.code} {found.message}" for found in error.diagnostics]
    return []


@pytest.mark.parametrize("name", sorted(rule_files()))
def test_every_rule_of_the_library_can_train(name: str) -> None:
    assert load_rule(name)


@pytest.mark.parametrize(
    "row",
    [
        "{at: ffn, modify: out, form: v + sign(v) * x, params: {v: {shape: [d_in], init: ones}}}",
        "{at: ffn, modify: out, form: sign(v) * w * x, params: {v: {shape: [d_in], init: ones, frozen: true}, "
        "w: {shape: [1], init: ones}}}",
        "{at: ffn, modify: out, form: '(sign(v) if d_in > r else v) * x', params: {v: {shape: [d_in], init: ones}}}",
        "{at: ffn, modify: out, form: act(v) * x, params: {v: {shape: [d_in], init: ones}}}",
        "{at: attention, modify: heads, form: prefix, with: {l: 4}, params: {g: {shape: [1], init: zeros}}, "
        "let: {t: tanh(g)}, compose: h + t * dh}",
        "{at: ffn, modify: out, form: '(x + v)[:, 0:1]', params: {v: {shape: [d_in], init: ones}}}",
        "{at: ffn, modify: out, form: 'where(greater(x, 0), v * x, x)', params: {v: {shape: [d_in], init: ones}}}",
    ],
)
def test_parameter_that_a_gradient_may_reach_is_left_alone(row: str) -> None:
    assert told(row) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "{at: ffn, modify: out, form: round(v) * x, params: {v: {shape: [d_in], init: ones}}}",
            "E024 no gradient reaches `v`: `round` lets none through",
        ),
        (
            "{at: ffn, modify: out, form: 1 * x, params: {v: {shape: [1], init: ones}}, let: {t: v * 2}, "
            "compose: h + dh}",
            "E024 no gradient reaches `v`: the new value does not read it",
        ),
        (
            "{at: attention, modify: heads, form: prefix, with: {l: 4}, params: {g: {shape: [1], init: zeros}}, "
            "let: {t: sign(g)}, compose: h + t * dh}",
            "E024 no gradient reaches `g`: `sign` lets none through",
        ),
    ],
)
def test_parameter_out_of_reach_is_told(row: str, message: str) -> None:
    assert told(row) == [message]
