"""Whatever is done to a rule's text, loading it gives a rule or a told mistake, never another exception."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftc.diagnostics import PeftcError
from peftc.lang.expr import evaluate_static, parse
from peftc.lang.loader import load_rule, parse_rule
from peftc.lang.rule import Rule

RULES = sorted((Path(__file__).parents[2] / "rules").glob("*.yaml"))
TEXTS = [path.read_text(encoding="utf-8") for path in RULES]
PIECES = [
    *"{}[]:,-?*&!|>'\"%@`#\n\t\\ .()+/=\x00\x1b\x85λ\ud800\U0001f600",
    *(": ", "- ", "<<: *a", "&a ", "*a", "!!python/name:os.system ", "~", "null", "[[", "}}", "1e999", "0x", "-1", "0"),
    *("r", "dh", "h", "lambda", "at: ffn", "\n  ", "---\n", "if", " if h else ", "**", "@", "x[0]", ".T", "None"),
    *('"\\UFFFFFFFF"', '"\\ud800"', "%YAML 1.1\n", "deltas:", "form: ", "relu(", "99999999999999999999", "\r\n"),
]


@st.composite
def mutants(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 12))
        piece = draw(st.sampled_from(PIECES) | st.text(max_size=3))
        text = text[:at] + piece + text[at + cut :]
    return text


def check_told(text: str) -> None:
    try:
        rule = parse_rule(text, "mutant.yaml", {"r": "3"} if "r:" in text else None)
    except PeftcError as error:
        assert error.diagnostics
        for diagnostic in error.diagnostics:
            assert diagnostic.render()
            str(diagnostic.render()).encode("utf-8", "surrogatepass")
            span = diagnostic.span
            assert span is None or (span.line >= 1 and 1 <= span.col < span.end_col)
    else:
        assert isinstance(rule, Rule)
        assert parse_rule(rule.text, "again.yaml").values == rule.values


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutants())
def test_mutated_rule_loads_or_is_told(text: str) -> None:
    check_told(text)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="hxd()[]+-*/@.,:'= 019TrifnotelsW_{}<>!%&|^~#\\\n", max_size=40))
def test_any_text_as_an_expression_is_read_or_told(text: str) -> None:
    for mode in ("tensor", "static", "init"):
        try:
            expr = parse(text, mode=mode)
            evaluate_static(expr, {"r": 64, "x": 0.5, "h": "word", "d": None})
        except PeftcError as error:
            assert error.diagnostics


@pytest.mark.parametrize("name", [path.stem for path in RULES])
def test_library_rule_loads_and_its_text_loads_as_the_same_rule(name: str) -> None:
    rule = load_rule(name)
    assert rule.name == name
    assert rule.doc
    again = parse_rule(rule.text, rule.file)
    assert again.text == rule.text
    assert again.values == rule.values
    assert [delta.name for delta in again.deltas] == [delta.name for delta in rule.deltas]
