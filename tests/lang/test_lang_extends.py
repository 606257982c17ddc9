"""Rules that take from other files: what is merged, what is replaced, and that the resolved text is the same rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc.checking.check import check
from peftc.diagnostics import Collector, PeftcError, Span
from peftc.lang.emit import emit
from peftc.lang.library import read, rule_files
from peftc.lang.loader import load_rule, parse_rule
from peftc.lang.rule import Expr, Rule
from peftc.lang.source import MAX_BYTES, compose
from peftc.lang.tree import MappingNode, Node, ScalarNode, plain

LIBRARY = sorted(rule_files())


def meaning(value: Any) -> Any:
    """A rule without its places, its tests and who gave its values: equal for rules that do the same."""
    if isinstance(value, Expr):
        return value.text
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        skipped = ("span", "spans", "file", "text", "tests", "given")
        return {f.name: meaning(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in skipped}
    if isinstance(value, dict):
        return [(key, meaning(item)) for key, item in value.items()]
    return [meaning(item) for item in value] if isinstance(value, tuple) else value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, name: str = "mine.yaml", **sets: object) -> Rule:
    Path(name).write_text(text, encoding="utf-8")
    rule = load_rule(name, sets)
    again = parse_rule(rule.text, "again.yaml")
    assert meaning(again) == meaning(rule)
    assert again.text == rule.text
    assert not any(f"{word}:" in rule.text for word in ("extends", "include"))
    return rule


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", LIBRARY)
def test_rule_that_only_extends_is_the_rule_it_extends(name: str) -> None:
    assert meaning(load(f"peftc: 1\nextends: {name}\n")) == meaning(load_rule(name))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", LIBRARY)
def test_values_set_stand_in_the_resolved_text(name: str) -> None:
    for hyper in load_rule(name).hyper.values():
        if isinstance(hyper.value, int) and not isinstance(hyper.value, bool):
            rule = load(f"peftc: 1\nextends: {name}\n", **{hyper.name: hyper.value + 1})
            assert meaning(rule) == meaning(load_rule(name, {hyper.name: hyper.value + 1}))


def text_of(tree: object) -> str:
    """A tree of Python values as YAML, every word quoted."""
    import json

    return json.dumps(tree, ensure_ascii=False)


def halves(whole: dict[str, Any], draw: Any, path: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """`whole` as a parent and the child that makes it whole: entries go to either, or differ and are put right."""
    parent: dict[str, Any] = {}
    child: dict[str, Any] = {}
    for name, value in whole.items():
        named = len(path) < 2 and (*path, name)[0] in ("hyper", "deltas")
        inside = path[2:] == ("params",) or (len(path) == 2 and name in ("where", "with", "params", "let"))
        where = draw(st.sampled_from(["parent", "child", "both"]))
        if where == "both" and isinstance(value, dict) and value and (named or inside):
            parent[name], child[name] = halves(value, draw, (*path, name))
        elif where == "both":
            parent[name], child[name] = "something else", value
        else:
            (parent if where == "parent" else child)[name] = value
    return parent, child


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rule_split_in_two_by_extends_is_the_same_rule(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    name = data.draw(st.sampled_from(LIBRARY))
    tree = compose(read(rule_files()[name], name), name, Collector())
    whole = plain(tree)
    assert isinstance(whole, dict)
    del whole["peftc"]
    parent, child = halves(whole, data.draw)
    if data.draw(st.booleans()):
        parent.setdefault("deltas", {})["unwanted"] = {"at": "nowhere"}
        child.setdefault("deltas", {})["unwanted"] = None
    folder = tmp_path_factory.mktemp("halves")
    (folder / "parent.yaml").write_text(text_of({"peftc": 1, **parent}), encoding="utf-8")
    (folder / "child.yaml").write_text(text_of({"peftc": 1, "extends": "parent.yaml", **child}), encoding="utf-8")
    rule = load_rule(folder / "child.yaml")
    assert unordered(meaning(rule)) == unordered(meaning(load_rule(name)))
    assert meaning(parse_rule(rule.text, "again.yaml")) == meaning(rule)


def unordered(rule: dict[str, Any]) -> dict[str, Any]:
    """The order of rows, parameters and hyperparameters is that of the parent, then of the child."""
    deltas = sorted(rule["deltas"], key=lambda delta: delta["name"])
    for delta in deltas:
        delta["arguments"], delta["places"] = sorted(delta["arguments"]), sorted(delta["places"])
        delta["params"] = sorted(delta["params"], key=lambda param: param["name"])
    return {**rule, "deltas": deltas, "hyper": sorted(rule["hyper"])}


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(blacklist_categories=("C", "Z")) | st.sampled_from(" \n\t:#'\"{}[],&*!|>%@`-~"), max_size=30),
    st.sampled_from(["null", "1e-4", "yes", "h + s * dh", "(alpha / r) * dh", "- a", "a: b", "x #", "0x10", ""]),
)  # fmt: skip
KEYS = st.text("ab0-_ :#\"'λ", max_size=6)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=25,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text("abc_0 -:", min_size=1, max_size=8), TREES, min_size=1, max_size=5))
def test_emitted_tree_reads_back_as_itself(value: dict[str, Any]) -> None:
    tree = compose(text_of(value), "t.yaml", Collector())
    assert isinstance(tree, MappingNode)
    collector = Collector()
    again = compose(emit(tree), "again.yaml", collector)
    assert not collector.diagnostics
    assert plain(again) == plain(tree)
    assert texts(again) == texts(tree)


def texts(node: Node) -> list[Any]:
    """What expressions are read from: the text of numbers, and the kind of every value."""
    if isinstance(node, ScalarNode):
        return [node.text if node.value is not None else "", type(node.value)]
    parts = [part for _, part in node.entries.values()] if isinstance(node, MappingNode) else node.items
    return [texts(part) for part in parts]


@pytest.mark.usefixtures("here")
def test_rows_are_merged_and_the_rest_is_replaced() -> None:
    rule = load(
        "peftc: 1\nname: mine\nextends: mam\nhyper: {r: 16, s: {max: 8}, l: null}\n"
        "deltas:\n  prefix: null\n  adapter: {where: {layers: first 2}, with: {f: gelu}, compose: h + dh * s}\n"
        "  extra: {at: attention, modify: q, form: low_rank}\n"
    )
    assert (rule.name, rule.paper) == ("mine", "He et al. 2022, section 4.6")
    assert [delta.name for delta in rule.deltas] == ["adapter", "extra"]
    adapter = rule.deltas[0]
    assert (adapter.at, adapter.insert, adapter.compose.text) == (("ffn",), "parallel", "h + dh * s")
    assert (adapter.where.layers, adapter.arguments) == ("first 2", {"f": "gelu"})
    assert rule.values == {"r": 16, "s": 4.0, "f": "relu", "bias": True}
    assert (rule.hyper["r"].min, rule.hyper["r"].doc, rule.hyper["s"].max) == (1, "bottleneck width", 8)


@pytest.mark.usefixtures("here")
def test_value_of_layers_wins_over_those_of_the_rule_that_is_extended() -> None:
    head = "peftc: 1\nname: base\nhyper: {r: {default: 2, layers: {0: 16, first 2: 8}}}\n"
    Path("base.yaml").write_text(f"{head}deltas: {{lora: {{at: attention, modify: q, form: low_rank}}}}\n")
    rule = load("peftc: 1\nname: mine\nextends: base.yaml\nhyper: {r: {layers: {0: 4}}}\n")
    assert [rule.values_at(layer, 4)["r"] for layer in range(4)] == [4, 8, 2, 2]


@pytest.mark.usefixtures("here")
def test_chain_of_rules_is_followed_relative_to_each_file() -> None:
    Path("far/deep").mkdir(parents=True)
    Path("far/deep/gate.yaml").write_text(
        "peftc-form: 1\nname: gated\nparams: {g: {shape: [d_out], init: zeros}}\ndh: g * x\n"
    )
    Path("far/deep/top.yaml").write_text(
        "peftc: 1\nname: top\ndoc: the top\ninclude: [gate.yaml]\n"
        "deltas: {a: {at: ffn, modify: out, form: gated, insert: sequential}}\n"
        "tests: {never: inherited}\n"
    )
    Path("far/middle.yaml").write_text("peftc: 1\nname: middle\nextends: deep/top.yaml\ndeltas: {a: {expect: 2}}\n")
    rule = load("peftc: 1\nname: mine\nextends: far/middle.yaml\ndeltas: {a: {expect: null}}\n")
    assert (rule.name, rule.doc, rule.deltas[0].expect) == ("mine", "the top", None)
    assert rule.deltas[0].form.name == "gated"
    assert "forms:\n  gated: {params" in rule.text


@pytest.mark.usefixtures("here")
def test_form_of_the_rule_does_what_the_same_form_of_the_library_does() -> None:
    row = "deltas: {a: {at: attention, modify: [q, v], form: NAME, compose: h + (alpha / r) * dh}}\n"
    head = "peftc: 1\nname: t\nhyper: {r: 8, alpha: 16.0}\n"
    body = load_form_file("low_rank").read_text(encoding="utf-8").split("\n", 3)[3]
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    own = load(head + "forms:\n  mine:\n" + indented + row.replace("NAME", "mine"))
    library = load(head + row.replace("NAME", "low_rank"), "library.yaml")
    ours, theirs = meaning(own)["deltas"], meaning(library)["deltas"]
    assert ours[0]["form"].pop("name") == "mine"
    assert theirs[0]["form"].pop("name") == "low_rank"
    assert ours == theirs


def load_form_file(name: str) -> Any:
    import importlib.resources

    return importlib.resources.files("peftc.rules").joinpath("forms", f"{name}.yaml")


@pytest.mark.usefixtures("here")
def test_included_form_of_the_child_takes_the_place_of_the_parents_whole() -> None:
    Path("one.yaml").write_text(
        "peftc-form: 1\nname: f\nlet: {z: x}\nparams: {g: {shape: [d_out], init: zeros}}\ndh: g * z\n"
    )
    Path("parent.yaml").write_text(
        "peftc: 1\nname: p\ninclude: [one.yaml]\ndeltas: {a: {at: ffn, modify: out, form: f, insert: sequential}}\n"
    )
    Path("two.yaml").write_text("peftc-form: 1\nname: f\nparams: {b: {shape: [d_out], init: zeros}}\ndh: identity(b)\n")
    rule = load("peftc: 1\nname: mine\nextends: parent.yaml\ninclude: [two.yaml]\n")
    assert [p.name for p in rule.deltas[0].form.params] == ["b"]
    assert rule.deltas[0].form.let == {}
    merged = load(
        "peftc: 1\nname: mine\nextends: parent.yaml\nforms: {f: {params: {g: {init: ones}}}}\n", "merged.yaml"
    )
    assert [p.init.text for p in merged.deltas[0].form.params] == ["ones"]


@pytest.mark.usefixtures("here")
def test_null_under_with_is_a_value_where_the_parent_has_none() -> None:
    parent = "peftc: 1\nname: p\ndeltas: {a: {at: ffn, modify: out, form: bottleneck, with: {r: 4, f: tanh}}}\n"
    Path("p.yaml").write_text(parent)
    rule = load("peftc: 1\nextends: p.yaml\ndeltas: {a: {with: {f: null, bias: null}}}\n")
    assert rule.deltas[0].arguments == {"r": 4, "bias": None}


@pytest.mark.usefixtures("here")
def test_plain_rule_keeps_its_comments_and_layout() -> None:
    text = "peftc: 1 # one\nname: mine\nforms:   {g: {dh: relu(x)}} # two\nhyper: {r:  4}\n"
    text += "deltas: {a: {at: ffn, modify: out, form: g, compose: h + r * dh}}\n"
    assert load(text, r=5).text == text.replace("r:  4", "r:  5")


def told(text: str, **files: str) -> list[tuple[str, str]]:
    for name, content in files.items():
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    Path("mine.yaml").write_text(text, encoding="utf-8")
    (checked,) = check(["mine.yaml"]).files
    return [(d.code, shown(d.span)) for d in checked.diagnostics]


def shown(span: Span | None) -> str:
    return f"{span.file}: {span.text[span.col - 1 : span.end_col - 1]}" if span else ""


PARENT = "peftc: 1\nname: p\nhyper: {r: 4, unused: 2}\n"
PARENT += "deltas: {a: {at: ffn, modify: out, form: bottleneck, let: {z: mean(h)}}}\n"


@pytest.mark.usefixtures("here")
def test_warnings_are_those_of_the_file_that_is_checked() -> None:
    assert told("peftc: 1\nextends: p.yaml\nhyper: {r: 8, s: 1.0}\n", p=PARENT) == [("W003", "mine.yaml: s")]
    gate = "peftc-form: 1\nname: g\ndh: relu(x)\n"
    assert told("peftc: 1\nextends: p.yaml\ninclude: [g.yaml]\nforms: {k: {dh: x, let: {z: x}}}\n", g=gate) == [
        ("W008", "mine.yaml: g.yaml"), ("W008", "mine.yaml: k"), ("W002", "mine.yaml: z")
    ]  # fmt: skip


@pytest.mark.usefixtures("here")
def test_mistakes_of_every_file_are_told_together_each_in_its_own() -> None:
    found = told("peftc: 1\nextends: p.yaml\nhyper: {r: 0}\n", p=PARENT.replace("mean(h)", "maen(h)"))
    assert found == [("E014", "mine.yaml: 0"), ("E007", "p.yaml: maen")]


@pytest.mark.usefixtures("here")
def test_unreadable_and_endless_files_are_told_at_the_token() -> None:
    Path("bytes.yaml").write_bytes(b"\xff\xfe")
    Path("large.yaml").write_text(f"peftc: 1\nname: {'x' * MAX_BYTES}\n")
    Path("folder.yaml").mkdir()
    for name, code in (("bytes", "E001"), ("large", "E017"), ("folder", "E018")):
        with pytest.raises(PeftcError) as raised:
            load(f"peftc: 1\nextends: {name}.yaml\n")
        (diagnostic,) = raised.value.diagnostics
        assert diagnostic.code == code
        assert diagnostic.span is not None


@pytest.mark.usefixtures("here")
def test_total_size_of_all_files_is_bounded() -> None:
    form = "peftc-form: 1\nname: f{}\ndoc: {}\ndh: relu(x)\n"
    for index in range(40):
        Path(f"f{index}.yaml").write_text(form.format(index, "x" * 5000))
    includes = ", ".join(f"f{index}.yaml" for index in range(40))
    row = "deltas: {a: {at: ffn, modify: out, form: f1}}\n"
    with pytest.raises(PeftcError, match="more than 128 KiB"):
        load(f"peftc: 1\nname: t\ninclude: [{includes}]\n{row}")
    for index in range(40):
        Path(f"f{index}.yaml").write_text(form.format(index, "x"))
    with pytest.raises(PeftcError, match="more than 32 files"):
        load(f"peftc: 1\nname: t\ninclude: [{includes}]\n{row}")


def test_misspelt_entry_of_rewrite_is_told_as_a_misspelt_row_is(here: Path) -> None:
    (here / "base.yaml").write_text("peftc: 1\nname: base\nrewrite: {skip: {at: block, set: {out: x}}}\n")
    child = "peftc: 1\nname: a\nextends: base.yaml\nrewrite: {skp: {where: {layers: [0]}}}\n"
    with pytest.raises(PeftcError) as raised:
        load(child)
    (found,) = raised.value.diagnostics
    assert (found.code, found.help) == ("E050", "did you mean `skip`?")


def test_reference_that_is_no_expression_is_helped_as_a_reference(here: Path) -> None:
    row = '{at: ffn, modify: out, from: "block[-1.out", form: nowhere}'
    with pytest.raises(PeftcError) as raised:
        load(f"peftc: 1\nname: a\ndeltas: {{a: {row}}}\n")
    found = {diagnostic.code: diagnostic.help or "" for diagnostic in raised.value.diagnostics}
    assert "attention.out" in found["E011"]
    assert "E006" in found, "a mistake in `form` is told beside it"
