"""A pattern that finds nothing is told at its own line, with the nearest miss; so is a pattern file with a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from fold.conftest import Checkpoints

from peftc import driver
from peftc.checking.check import check
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.lang.loader import load_rule

RULE = "peftc: 1\nname: t\nhyper: {r: 4}\npatterns:\n  mine:\n    match:\n"


def told(lines: str, keys: str, model: Path, tmp_path: Path) -> Diagnostic:
    text = RULE + "".join(f"      - {line}\n" for line in lines.split("\n")) + keys
    file = tmp_path / "t.yaml"
    file.write_text(f"{text}deltas:\n  a: {{at: mine, modify: out, form: low_rank}}\n", encoding="utf-8")
    (checked,) = check([str(file)], model=model).files
    (found,) = checked.diagnostics
    assert found.code == "E020"
    return found


def token(diagnostic: Diagnostic) -> str:
    assert diagnostic.span is not None
    return diagnostic.span.text[diagnostic.span.col - 1 : diagnostic.span.end_col - 1]


GATED = "g = linear(x, W_g)\nu = linear(x, W_u)\nout = linear(gelu(g) * u, W_d)"
PLAIN = "up = linear(x, W_u, b_u?)\nout = linear(gelu(up), W_d, b_d?)"


@pytest.mark.parametrize(
    ("family", "lines", "keys", "reason", "at"),
    [
        ("llama", GATED, "", "8 candidates; the nearest has silu where the pattern has `gelu`", "gelu"),
        ("bert", PLAIN.replace("gelu", "silu"), "", "the nearest 2 have gelu where the pattern has `silu`", "silu"),
        ("bert", PLAIN.replace(", b_u?", ""), "", "2 have a bias where the pattern has `linear(x, W_u)`", "linear"),
        ("bert", PLAIN, "    shapes: {W_u: [f, d]}\n    where: f < d\n", "the nearest 2 have f=24, d=16", "f < d"),
        ("bert", PLAIN, "    shapes: {W_u: [f, f]}\n", "2 have `W_u` of shape [24, 16], where f is 24", "[f, f]"),
        ("bert", PLAIN, "    shapes: {W_u: [24, 17]}\n", "2 have `W_u` of shape [24, 16], where 17 is 17", "[24, 17]"),
        ("bert", PLAIN, "    single: x\n", "2 have another reader of `x`, add", "x"),
        ("bert", "out = mish(x)", "", "this model has no `mish`, the op of the pattern's output", "mish"),
        ("bert", "a = linear(x, W_a, b?)\nout = tanh(a) * 0.5", "", "this model has no `*`, the op", "*"),
    ],
)  # fmt: skip
def test_the_nearest_miss_is_told_at_the_token_that_excluded_it(
    family: str, lines: str, keys: str, reason: str, at: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = told(lines, keys, checkpoint(family), tmp_path)
    assert found.message.startswith("delta `a` matches nothing: ")
    assert reason in found.message
    assert token(found) == at


def test_the_nearest_miss_says_where_in_the_model_and_where_the_row_is(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = told(GATED, "", checkpoint("llama"), tmp_path)
    assert found.message == (
        "delta `a` matches nothing: `out = linear(gelu(g) * u, W_d)`: 8 candidates; "
        "the nearest has silu where the pattern has `gelu`"
    )
    assert found.help == f"at model.layers.0.mlp.act_fn; the row is at {tmp_path / 't.yaml'}:11:11"


def test_the_nearest_miss_in_an_included_pattern_is_told_in_its_file(checkpoint: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "geglu.yaml").write_text(
        "peftc-pattern: 1\nname: geglu\nmatch:\n" + "".join(f"  - {line}\n" for line in GATED.split("\n")), "utf-8"
    )
    rule = "peftc: 1\nname: t\ninclude: [geglu.yaml]\ndeltas: {a: {at: geglu, modify: out, form: '1 * x'}}\n"
    (tmp_path / "t.yaml").write_text(rule, "utf-8")
    assert [*load_rule(tmp_path / "t.yaml").patterns] == ["geglu"]
    with pytest.raises(PeftcError) as raised:
        driver.plan(tmp_path / "t.yaml", checkpoint("llama"))
    (found,) = raised.value.diagnostics
    assert str(found.span) == f"{tmp_path / 'geglu.yaml'}:6:18"


def test_a_rule_that_extends_another_may_change_its_pattern(tmp_path: Path) -> None:
    base = RULE + "      - out = silu(x)\ndeltas: {a: {at: mine, modify: out, form: '1 * x'}}\n"
    (tmp_path / "base.yaml").write_text(base.replace("hyper: {r: 4}\n", ""), "utf-8")
    child = "peftc: 1\nname: c\nextends: base.yaml\npatterns: {mine: {match: [out = gelu(x)]}}\n"
    (tmp_path / "child.yaml").write_text(child, "utf-8")
    rule = load_rule(tmp_path / "child.yaml")
    term = rule.patterns["mine"].variants[0].roots[0]
    assert getattr(term, "title", "") == "gelu"
    (tmp_path / "again.yaml").write_text(rule.text, "utf-8")
    assert load_rule(tmp_path / "again.yaml").patterns["mine"].taps == rule.patterns["mine"].taps


def test_check_accepts_pattern_files_and_tells_their_mistakes(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("peftc-pattern: 1\nname: good\nmatch: out = tanh(linear(x, W, b?))\n", "utf-8")
    bad.write_text("peftc-pattern: 1\nname: bad\nmatch: out = tahn(linear(x, W, b?))\n", "utf-8")
    report = check([str(good), str(bad)])
    assert [file.diagnostics for file in report.files[:1]] == [()]
    (found,) = report.files[1].diagnostics
    assert (found.code, found.help, token(found)) == ("E007", "did you mean `tanh`?", "tahn")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("peftc-pattern: 2\nname: a\nmatch: out = tanh(x)\n", "E019"),
        ("peftc-pattern: 1\nmatch: out = tanh(x)\n", "E010"),
        ("peftc-pattern: 1\nname: a\n", "E010"),
        ("peftc-pattern: 1\nname: ffn\nmatch: out = tanh(x)\n", "E023"),
        ("peftc-pattern: 1\nname: a\nmatch: 3\n", "E009"),
        ("peftc-pattern: 1\nname: a\nmatch: []\n", "E010"),
        ("peftc-pattern: 1\nname: a\nmatch: [{any: [[], [a = tanh(x)]]}]\n", "E010"),
        ("peftc-pattern: 1\nname: a\nmatch: _ = tanh(x)\n", "E011"),
        ("peftc-pattern: 1\nname: a\nmatch: ['out = any(tanh(x), x)']\n", "E011"),
        ("peftc-pattern: 1\nname: a\nmatch: ['out = nearest(linear(x, W))']\n", "E011"),
    ],
)
def test_a_pattern_file_that_is_none_is_told(text: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text, "utf-8")
    (checked,) = check([str(file)]).files
    assert [d.code for d in checked.diagnostics] == [code]
