"""Rules of many files, with values by layer, budgets and an order: whatever is done to their text, a rule or a mistake.

What loads is written as a text that stands alone and says the same.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as with_data
from hypothesis import strategies as st

from peftc.diagnostics import PeftcError
from peftc.lang.lint import lint
from peftc.lang.loader import parse_rule

FORM = "peftc-form: 1\nname: gated\ndoc: a gate\nparams:\n  g: {shape: [d_out], init: zeros}\ndh: g * x\n"
PARENT = """\
peftc: 1
name: p
extends: mam
hyper: {q: {default: 1.5e-4}}
deltas:
  adapter: {where: {layers: first 2}, compose: h + s * dh * q}
"""
CHILD = """\
peftc: 1
name: a
extends: p.yaml
include: [f.yaml]
hyper:
  r: {default: 16, layers: {0: 4, last 2: 3, 1-2: 8, -1: 9}}
  q: {budget: 0.5%, min: 1, max: 9}
  l: {default: 4, doc: null}
forms:
  own: {args: {z: 1}, params: {g: {shape: [d_out], init: zeros}}, let: {k: g * z}, dh: k * x}
deltas:
  prefix: null
  adapter: {where: {layers: null, stack: encoder}, compose: h + s * dh * q, before: g}
  g: {at: ffn, modify: out, form: gated, insert: sequential, after: [own]}
  own: {at: ffn, modify: out, form: own, insert: sequential, before: adapter, with: {z: null}}
"""
ALONE = """\
peftc: 1
name: a
hyper: {r: {default: 4, layers: {-2: 8}}, q: {budget: 5000}, s: 1.0}
deltas:
  b: {at: ffn, modify: out, form: bottleneck, where: {layers: 0-1}, compose: h + s * dh, after: a}
  a: {at: ffn, modify: out, form: bottleneck, with: {r: 2 * q}}
"""
PIECES = [
    *"{}[]:,-?*&!|>'\"%@`#\n\t .()+/=\x00λ", ": ", "- ", "&a ", "*a", "~", "null", "0x", "-1", "0", "0%", "1%", "500%",
    "extends: ", "include: ", "[f.yaml]", "lora", "p.yaml", "mine.yaml", "forms: ", "layers: ", "budget: ", "default: ",
    "before: ", "after: ", "last 1", "first 0", "3-1", "0-999999", "tests: ", "patterns: ", "peftc-form: 1\n", "with: ",
    "hyper: ", "..", "/", ".yaml",
]  # fmt: skip
SETS: list[dict[str, object]] = [{}, {"r": "3"}, {"r": "2%"}, {"q": "1 %"}, {"q": 4}]


@st.composite
def mutants(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from([CHILD, ALONE]))
    for _ in range(draw(st.integers(0, 5))):
        at, cut = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 0, 1, 3, 8, 12]))
        text = text[:at] + draw(st.sampled_from(PIECES)) + text[at + cut :]
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    (folder / "f.yaml").write_text(FORM, encoding="utf-8")
    (folder / "p.yaml").write_text(PARENT, encoding="utf-8")
    return folder / "mine.yaml"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@with_data(text=mutants(), sets=st.sampled_from(SETS))
def test_mutated_rule_of_many_files_loads_or_is_told(place: Path, text: str, sets: dict[str, object]) -> None:
    try:
        rule = parse_rule(text, str(place), sets)
    except PeftcError as error:
        assert error.diagnostics
        assert all(diagnostic.render() for diagnostic in error.diagnostics)
    else:
        again = parse_rule(rule.text, "again.yaml")
        assert again.text == rule.text
        assert {n: h.shown for n, h in again.hyper.items()} == {n: h.shown for n, h in rule.hyper.items()}
        assert [delta.name for delta in again.deltas] == [delta.name for delta in rule.deltas]
    assert all(warning.severity == "warning" for warning in lint(text, str(place)))


@pytest.mark.parametrize(
    ("given", "shown"), [({}, "0.5%"), ({"r": "3"}, "0.5%"), ({"q": "1 %"}, "1%"), ({"q": 4}, "4")]
)
def test_rule_of_many_files_loads_as_it_is(place: Path, given: dict[str, object], shown: str) -> None:
    rule = parse_rule(CHILD, str(place), given)
    assert [delta.name for delta in rule.deltas] == ["own", "adapter", "g"]
    assert rule.hyper["q"].shown == shown


def test_budget_set_beside_one_of_the_rule_is_told(place: Path) -> None:
    with pytest.raises(PeftcError, match="E052"):
        parse_rule(CHILD, str(place), {"r": "2%"})


def test_many_selectors_of_many_layers_take_no_time(place: Path) -> None:
    entries = ", ".join(f"{i}-999999: 4" for i in range(500))
    text = ALONE.replace("{-2: 8}", f"{{{entries}}}")
    start = time.process_time()
    hyper = parse_rule(text, str(place)).hyper["r"]
    assert [hyper.at(layer, 80) for layer in range(80)] == [4] * 80
    assert time.process_time() - start < 2
