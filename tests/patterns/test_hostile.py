"""Whatever is done to a pattern's text, reading it gives a pattern or a told mistake, never another exception."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftc.diagnostics import PeftcError
from peftc.patterns.reading import parse_pattern
from peftc.patterns.terms import Pattern

FILES = sorted((Path(__file__).parents[2] / "rules" / "patterns").glob("*.yaml"))
TEXTS = [path.read_text(encoding="utf-8") for path in FILES]
PIECES = [
    *"{}[]:,-?*&!|>'\"%@`#\n\t\\ .()+/=_\x00λ",
    *(": ", "- ", "any", "any(", "nearest(", "split(", "?", "??", " = ", "==", "W", "_", "out", "x", "**", "lambda"),
    *("linear(x, W)", "1e999", "-1", "single: ", "taps: {", "outputs: ", "where: 1", "shapes: ", "a, b = ", "\n  - "),
]


@st.composite
def mutants(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 6))):
        at, cut = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
        text = text[:at] + draw(st.sampled_from(PIECES) | st.text(max_size=3)) + text[at + cut :]
    return text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutants())
def test_mutated_pattern_is_read_or_told(text: str) -> None:
    try:
        assert isinstance(parse_pattern(text, "mutant.yaml"), Pattern)
    except PeftcError as error:
        assert error.diagnostics
        for diagnostic in error.diagnostics:
            assert diagnostic.render()
            span = diagnostic.span
            assert span is None or (span.line >= 1 and 1 <= span.col < span.end_col)


def test_nested_alternatives_are_counted_before_they_are_written_out() -> None:
    """Every line doubles the ways: forty lines would be a million million variants."""
    lines = "".join(f"  - a{i} = any(tanh(a{i - 1}), relu(a{i - 1}))\n" for i in range(1, 41))
    with pytest.raises(PeftcError) as raised:
        parse_pattern(f"peftc-pattern: 1\nname: a\nmatch:\n  - a0 = tanh(x)\n{lines}", "a.yaml")
    (told,) = raised.value.diagnostics
    assert told.code == "E017"
    assert f"{2**40} ways" in told.message
