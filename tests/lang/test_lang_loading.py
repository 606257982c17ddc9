"""Loading rules: names and paths, set values and their bounds, forms, and the resolved source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from peftc.diagnostics import PeftcError
from peftc.lang.loader import form_names, list_rules, load_form, load_rule, parse_rule
from peftc.lang.rule import Expr

RULE = """\
peftc: 1
name: mine   # a comment
hyper: {r: 64, s: 4.0, f: relu, bias: true, q: {default: 2, min: 1, max: 8}}
deltas:
  a: {at: ffn, modify: out, form: bottleneck, compose: h + s * dh}
"""


def told(text: str = RULE, /, **sets: object) -> list[str]:
    with pytest.raises(PeftcError) as raised:
        parse_rule(text, "t.yaml", sets)
    return [f"{d.code} {d.message}" for d in raised.value.diagnostics]


def test_defaults_are_the_values_of_the_file() -> None:
    assert parse_rule(RULE, "t.yaml").values == {"r": 64, "s": 4.0, "f": "relu", "bias": True, "q": 2}


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("r", "32", 32),
        ("r", 32, 32),
        ("s", "2", 2.0),
        ("s", 2, 2.0),
        ("s", "1e-4", 1e-4),
        ("f", "gelu", "gelu"),
        ("bias", "false", False),
        ("bias", False, False),
        ("q", "8", 8),
    ],
)
def test_set_value_takes_the_type_of_its_default_and_stands_in_the_text(
    name: str, given: object, value: object
) -> None:
    rule = parse_rule(RULE, "t.yaml", {name: given})
    assert rule.values[name] == value
    assert type(rule.values[name]) is type(value)
    again = parse_rule(rule.text, "t.yaml")
    assert again.values == rule.values
    changed = [(a, b) for a, b in zip(RULE.splitlines(), rule.text.splitlines(), strict=True) if a != b]
    assert [line for line, _ in changed] == RULE.splitlines()[2:3]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("r", "6.5"),
        ("r", 6.5),
        ("r", "many"),
        ("r", "true"),
        ("r", True),
        ("r", None),
        ("r", "0"),
        ("r", "-3"),
        ("r", "1e3"),
        ("r", "9" * 5000),
        ("s", ".inf"),
        ("s", "nan"),
        ("s", float("nan")),
        ("s", 10**400),
        ("s", [1]),
        ("bias", "yes"),
        ("bias", 1),
        ("q", "0"),
        ("q", "9"),
        ("f", ""),
        ("f", "a\x1b[0m"),
        ("f", 3),
    ],
)
def test_set_value_that_does_not_fit_is_told(name: str, given: object) -> None:
    assert [line.split()[0] for line in told(RULE, **{name: given})] == ["E014"]


def test_unknown_hyperparameter_is_told_with_the_nearest() -> None:
    with pytest.raises(PeftcError) as raised:
        load_rule("mam", {"rr": 3})
    (diagnostic,) = raised.value.diagnostics
    assert (diagnostic.code, diagnostic.span, diagnostic.help) == ("E015", None, "did you mean `r`?")


def test_word_that_is_no_op_is_told_at_the_hyperparameter() -> None:
    with pytest.raises(PeftcError) as raised:
        load_rule("mam", {"f": "gleu"})
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "E007"
    assert diagnostic.help == "did you mean `gelu`?"


def test_only_set_scalars_are_rewritten_byte_for_byte() -> None:
    text = RULE.replace("\n", "\r\n").replace("r: 64", "'r' :   64 ") + "# end"
    rule = parse_rule(text, "t.yaml", {"r": 128, "f": "silu"})
    assert rule.text == text.replace("64 ", "128 ").replace("f: relu", "f: silu")


def test_alias_of_a_hyperparameter_is_replaced_and_its_anchor_kept() -> None:
    text = RULE.replace("r: 64", "r: &n 64").replace("default: 2", "default: *n").replace("max: 8", "max: 64")
    rule = parse_rule(text, "t.yaml", {"q": 3})
    assert rule.values["r"] == 64
    assert parse_rule(rule.text, "t.yaml").values == rule.values
    assert [line.split()[0] for line in told(text, r=3)] == ["E014"]


def test_word_that_yaml_would_read_otherwise_is_quoted_in_the_text() -> None:
    text = "peftc: 1\nname: t\nhyper: {f: a}\ntrain: ['*']\n"
    for word in ("null", "true", "12", "a: b", "it's", 'say "x"', "λ", "#", "- a", "{"):
        rule = parse_rule(text, "t.yaml", {"f": word})
        assert rule.values == {"f": word}
        assert parse_rule(rule.text, "t.yaml").values == {"f": word}


def test_library_name_and_path_load_the_same_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(load_rule("mam").text, encoding="utf-8")
    assert load_rule(path).values == load_rule("mam").values
    assert load_rule(str(path)).file == str(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").write_text(RULE, encoding="utf-8")
    assert load_rule("bare").name == "mine"


@pytest.mark.parametrize("name", ["mamm", "no/such.yaml", "mam.yml", ".", "a\0b", "x" * 5000, "", "/"])
def test_missing_rule_is_told(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PeftcError) as raised:
        load_rule(name)
    assert [d.code for d in raised.value.diagnostics] == ["E018"]
    if name == "mamm":
        assert raised.value.diagnostics[0].help == "did you mean `mam`?"


def test_library_lists_every_rule_and_form() -> None:
    rules = list_rules()
    assert "mam" in [rule.name for rule in rules]
    assert [rule.name for rule in rules] == sorted(rule.name for rule in rules)
    assert all(load_form(name).name == name for name in form_names())
    with pytest.raises(PeftcError, match="E006"):
        load_form("botleneck")


def test_mam_reads_as_the_table_of_the_paper() -> None:
    prefix, adapter = load_rule("mam").deltas
    assert (prefix.at, prefix.modify, prefix.insert, prefix.compose.text) == (
        ("attention",),
        ("heads",),
        "parallel",
        "gate",
    )
    assert (adapter.at, adapter.modify, adapter.insert) == (("ffn",), ("out",), "parallel")
    assert ast.dump(adapter.compose.tree) == ast.dump(ast.parse("h + s * dh", mode="eval").body)
    assert [param.name for param in prefix.form.params] == ["P_k", "P_v"]
    assert adapter.span_at("modify") is not None


def test_row_defaults_are_parallel_and_addition() -> None:
    (delta,) = parse_rule(RULE.replace(", compose: h + s * dh", ""), "t.yaml").deltas
    assert (delta.insert, delta.compose.text) == ("parallel", "h + dh")


def test_every_key_of_a_row_reaches_the_delta() -> None:
    text = """\
peftc: 1
name: t
hyper: {k: 2, act: gelu}
deltas:
  a:
    at: [linear, conv]
    modify: [out]
    insert: sequential
    form: {expr: "f(z) @ W.T", let: {z: x * c}, args: {c: 2.0, f: relu}, params: {W: {shape: [d_out, d_in], init: eye}}}
    with: {c: k / 4, f: act, d_out: 3}
    where: {layers: first  4, stack: encoder, kind: [self, cross], role: q, path: "*.query", if: d_in > k}
    params:
      g: {shape: [1, k + 1], init: constant(k), dtype: float16, share: layer, frozen: true, if: has_bias}
    let: {y: sigmoid(g) * dh}
    compose: h + sum(y)
    expect: 0
  b: {at: attention, modify: heads, form: {attend: {keys: K, values: K}, params: {K: {shape: [k, 1, 1], init: 0}}},
      compose: gate, lower: gated, where: {layers: [0, -1]}}
train: classifier.*
"""
    rule = parse_rule(text, "t.yaml")
    a, b = rule.deltas
    assert (a.at, a.modify, a.insert, a.expect) == (("linear", "conv"), ("out",), "sequential", 0)
    assert a.form.args == {"c": 2.0, "f": "relu"}
    assert {name: value.text for name, value in a.arguments.items() if isinstance(value, Expr)} == {
        "c": "k / 4",
        "f": "act",
    }
    assert a.arguments["d_out"] == 3
    where = a.where
    assert (where.layers, where.stack, where.kind, where.role) == ("first 4", ("encoder",), ("self", "cross"), ("q",))
    assert where.path == ("*.query",)
    assert where.condition is not None
    (g,) = a.params
    assert (g.dtype, g.share, g.frozen, g.init.text) == ("float16", "layer", True, "constant(k)")
    assert g.condition is not None
    assert (list(a.form.let), list(a.let)) == (["z"], ["y"])
    assert b.form.attend is not None
    assert (b.lower, b.where.layers, b.compose.text) == ("gated", (0, -1), "gate")
    assert [glob.pattern for glob in rule.train] == ["classifier.*"]


def test_size_below_one_is_told_wherever_a_shape_reads_it() -> None:
    row = "  a: {at: ffn, modify: out, form: sum(W), with: {n: k}, params: {W: {shape: [n, 2 * m], init: zeros}}}\n"
    text = "peftc: 1\nname: t\nhyper: {k: 1, m: 1}\ndeltas:\n" + row
    assert parse_rule(text, "t.yaml")
    assert told(text, k=0, m=-1) == [
        "E014 `k` is 0, but a size must be at least 1",
        "E014 `m` is -1, but a size must be at least 1",
    ]


def test_importing_the_language_imports_no_torch() -> None:
    code = (
        "import sys, peftc.lang.loader as l; l.list_rules(); sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_init_over_a_weight_at_an_unknown_site_is_told_once() -> None:
    row = "{at: attentoin, modify: q, form: low_rank, params: {S: {shape: [r], init: 'svd_s(weight, r)'}}}"
    with pytest.raises(PeftcError) as raised:
        parse_rule(f"peftc: 1\nname: a\nhyper: {{r: 4}}\ndeltas:\n  a: {row}\n", "a.yaml")
    assert [found.code for found in raised.value.diagnostics] == ["E005"]


LIST = """\
peftc: 1
name: listed
hyper: {ids: IDS}
deltas:
  a:
    at: ffn
    modify: out
    form: "gather(h, ids, dim=0)"
    compose: h + sum(dh) * sum(v)
    params: {v: {shape: [len(ids)], init: zeros}}
"""


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("11,12,40", (11, 12, 40)),
        (" 40, 11 ", (40, 11)),
        ("[7]", (7,)),
        ("7", (7,)),
        ([5, 3], (5, 3)),
        ((0x10,), (16,)),
    ],
)
def test_a_list_is_set_from_text_and_from_python_and_kept(given: object, value: tuple[int, ...]) -> None:
    for written in ("[1, 2]", "{default: [1, 2], min: 0, max: 63}"):
        rule = parse_rule(LIST.replace("IDS", written), "t.yaml", {"ids": given})
        assert rule.values == {"ids": value}
        assert parse_rule(rule.text, "kept.yaml").values == {"ids": value}
        assert rule.text.replace(str(list(value)), "[1, 2]") == LIST.replace("IDS", written)


@pytest.mark.parametrize("indent", ["", "  ", "      "], ids=["beside its key", "two in", "six in"])
def test_a_list_over_lines_is_replaced_whole(indent: str) -> None:
    lines = f"\n  ids:\n  {indent}- 1\n  {indent}- 2   # two\n  r: 3"
    text = LIST.replace(" {ids: IDS}", lines)
    rule = parse_rule(text, "t.yaml", {"ids": "5,6,7"})
    assert parse_rule(rule.text, "kept.yaml").values == rule.values == {"ids": (5, 6, 7), "r": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("5;6", "`--set ids=5;6`: `ids` must be a list of whole numbers"),
        ("5,,6", "`--set ids=5,,6`: `ids` must be a list of whole numbers"),
        ("five", "`--set ids=five`: `ids` must be a list of whole numbers"),
        ("1.5,2", "`--set ids=1.5,2`: `ids` must be a list of whole numbers"),
        (5, "`--set ids=5`: `ids` must be a list of whole numbers"),
        ([True], "`--set ids=True`: `ids` must be a list of whole numbers"),
        ([], "`--set ids=`: `ids` must be a list of whole numbers"),
        (range(2), "`--set ids=range(0, 2)`: `ids` must be a list of whole numbers"),
        (
            list(range(1025)),
            "`--set ids=0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15...`: `ids` must be a list of whole numbers",
        ),
        ("8,5,8", "`ids` lists 8 twice"),
        ("5,-1", "`ids` lists -1, but each number must be at least 0"),
        ("64,5", "`ids` lists 64, but each number must be at most 63"),
    ],
)
def test_a_wrong_list_is_told(given: object, message: str) -> None:
    assert told(LIST.replace("IDS", "{default: [1, 2], min: 0, max: 63}"), ids=given) == [f"E014 {message}"]


def test_a_list_for_a_number_is_told() -> None:
    assert told(r="1,2") == ["E014 `--set r=1,2`: `r` must be a whole number"]
    assert told(r=[1, 2]) == ["E014 `--set r=1,2`: `r` must be a whole number"]


def test_a_list_that_is_extended_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(LIST.replace("IDS", "{default: [1, 2], max: 63}"))
    child = tmp_path / "child.yaml"
    child.write_text("peftc: 1\nname: child\nextends: parent.yaml\nhyper: {ids: [7, 8, 9]}\n")
    rule = load_rule(child)
    assert (rule.values, rule.hyper["ids"].max) == ({"ids": (7, 8, 9)}, 63)
    assert parse_rule(rule.text, "kept.yaml").values == rule.values
    assert load_rule(child, {"ids": "4"}).values == {"ids": (4,)}
