"""Expressions: what the grammar admits, where carets stand, what static values come to."""

from __future__ import annotations

import time

import pytest

from peftc.diagnostics import PeftcError, Span
from peftc.lang.expr import calls_in, evaluate_static, names_in, parse
from peftc.lang.grammar import Mode
from peftc.lang.rule import Scalar

ENV: dict[str, Scalar] = {"heads": 12, "head_dim": 64, "r": 5, "s": 0.5, "norm": "in", "bias": True, "none": None}


def told(text: str, mode: Mode = "tensor", **keywords: object) -> list[tuple[str, str]]:
    """Codes and the text under the caret."""
    span = Span("t.yaml", 1, 1, 1 + len(text), text)
    with pytest.raises(PeftcError) as raised:
        parse(text, span, mode=mode, **keywords)  # pyright: ignore[reportArgumentType]
    return [
        (d.code, text[d.span.col - 1 : d.span.end_col - 1]) if d.span else (d.code, "")
        for d in raised.value.diagnostics
    ]


@pytest.mark.parametrize(
    "text",
    [
        "h + s * dh",
        "linear(z, W_up, None)",
        "x @ W.T",
        "kv[:, 0]",
        "kv[1:heads, -1]",
        "reshape(x, [a, -1])",
        "einsum('bsd,nrd->bnsr', x, W)",
        "softmax(x, dim=-1)",
        "(u if bias else x) / 2 ** 0.5",
        "layer_norm(x, w, b, eps=1e-6) if norm == 'in' and not bias else x",
        "concat(a, b, c, dim=1)",
        "-h",
    ],
)
def test_admitted_expression_is_read(text: str) -> None:
    assert parse(text).text == text


def test_names_are_those_read_and_not_those_called() -> None:
    expr = parse("f(linear(x, W)) + relu(s * norm(x))", words={"f": "gelu"})
    assert names_in(expr) == {"x", "W", "s"}
    assert set(calls_in(expr)) == {"f", "linear", "relu", "norm"}


def test_several_mistakes_of_one_expression_are_told_each_at_its_token() -> None:
    found = told("linear(rleu(x)) + [a for a in x] + softmax(x, axis=1)")
    assert found == [
        ("E012", "linear(rleu(x))"),
        ("E007", "rleu"),
        ("E011", "[a for a in x]"),
        ("E012", "axis=1"),
    ]


def test_word_argument_is_called_with_the_arity_of_its_op() -> None:
    assert told("f(x, W)", words={"f": "gelu"}) == [("E012", "f(x, W)")]
    assert parse("f(x, W)", words={"f": "linear"})


@pytest.mark.parametrize(
    "text",
    ["(" * 400 + "x" + ")" * 400, "-" * 900 + "x", "not " * 200 + "x", "a**" * 300 + "a", "x" + "[0]" * 300,
     "+".join(["x"] * 300), "9" * 900, "x" * 5000, "f(" * 300 + ")" * 300, "a if b else " * 70 + "c"],
)  # fmt: skip
def test_oversized_expression_is_refused_quickly(text: str) -> None:
    start = time.perf_counter()
    assert {code for code, _ in told(text)} <= {"E017", "E011"}
    assert time.perf_counter() - start < 1


def test_leading_space_of_a_quoted_expression_keeps_carets_in_place() -> None:
    assert told("   h + foo(dh)") == [("E007", "foo")]


@pytest.mark.parametrize("text", ["normal(0.02)", "zeros", "constant(s)", "0", "-1.5", "uniform(1 / r)", "eye"])
def test_initialiser_is_read(text: str) -> None:
    assert parse(text, mode="init").text == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("heads * head_dim // 2", 384),
        ("heads / 4", 3),
        ("heads / 5", 2.4),
        ("heads % r", 2),
        ("2 ** 10", 1024),
        ("-r + 1", -4),
        ("max(r, 8) + min(1, 2)", 9),
        ("r if norm == 'in' else head_dim", 5),
        ("norm != 'none'", True),
        ("bias and heads > 8", True),
        ("not bias or 0 < s <= 1", True),
        ("1 < 2 < 2", False),
        ("none == None", True),
    ],
)
def test_static_expression_comes_to(text: str, value: Scalar) -> None:
    found = evaluate_static(parse(text, mode="static"), ENV)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("hads * 2", "E008"),
        ("r / 0", "E014"),
        ("r // (heads - 12)", "E014"),
        ("r % 0.0", "E014"),
        ("0 ** -1", "E014"),
        ("norm + 1", "E009"),
        ("norm < 3", "E009"),
        ("none * 2", "E009"),
        ("-norm", "E009"),
        ("9007199254740992 * 9007199254740992", "E017"),
        ("(heads ** 20) ** r", "E017"),
        ("2 ** (r * 100)", "E017"),
        ("1e300 * 1e300", "E017"),
        ("(-2) ** 0.5", "E017"),
    ],
)
def test_static_expression_without_a_value_is_told(text: str, code: str) -> None:
    with pytest.raises(PeftcError) as raised:
        evaluate_static(parse(text, mode="static"), ENV)
    assert [d.code for d in raised.value.diagnostics] == [code]


def test_misspelt_dimension_is_told_with_the_nearest_at_its_token() -> None:
    text = "2 * hads"
    expr = parse(text, Span("t.yaml", 3, 10, 18, "  shape: " + text), mode="static")
    with pytest.raises(PeftcError) as raised:
        evaluate_static(expr, ENV)
    (diagnostic,) = raised.value.diagnostics
    assert str(diagnostic.span) == "t.yaml:3:14"
    assert diagnostic.help == "did you mean `heads`?"


def test_tensor_expression_is_not_static() -> None:
    with pytest.raises(PeftcError, match="E011"):
        evaluate_static(parse("relu(r)"), ENV)
