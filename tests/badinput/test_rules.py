"""Rules that are wrong, or fit no site of the model: told at their line of YAML, quickly, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from badinput.command import refused, run

Write = Callable[..., Path]

WRONG = {
    "key": ("E003", "a: {at: ffn, modfy: out, form: bottleneck}", "modfy", "did you mean `modify`?"),
    "op": ("E007", 'a: {at: ffn, modify: out, form: "gellu(x)"}', "gellu", "did you mean `gelu`?"),
    "tap": ("E004", "a: {at: ffn, modify: ou, form: bottleneck}", "ou,", "did you mean `out`?"),
    "site": ("E005", "a: {at: fn, modify: out, form: bottleneck}", "fn,", "did you mean `ffn`?"),
    "form": ("E006", "a: {at: ffn, modify: out, form: botleneck}", "botleneck", "did you mean `bottleneck`?"),
    "name": ("E008", 'a: {at: ffn, modify: out, form: "x * rr"}', "rr", "did you mean"),
    "tag": ("E016", "a: !!python/object/apply:os.system ['true']", "!!python", "write the plain value"),
    "nothing of that kind of attention": (
        "E020", "a: {at: attention, modify: out, form: bottleneck, where: {kind: cross}}", "cross",
        "these sites have: self",
    ),
    "nothing of that stack": (
        "E020", "a: {at: attention, modify: out, form: bottleneck, where: {stack: decoder}}", "decoder",
        "these sites have: encoder",
    ),
    "nothing in those layers": (
        "E020", "a: {at: ffn, modify: out, form: bottleneck, where: {layers: [7]}}", "[7]",
        "these sites have: layers 0 to 1",
    ),
    "embeddings are in no layer": (
        "E020", "a: {at: embedding, modify: out, insert: sequential, form: vector, where: {layers: [-1]}}", "[-1]",
        "these sites have: no layer",
    ),
    "nothing of that role": (
        "E020", "a: {at: linear, modify: out, form: bottleneck, where: {role: gate}}", "gate",
        "these sites have: q, k, v",
    ),
    "nothing at that path": (
        "E020", 'a: {at: linear, modify: out, form: bottleneck, where: {path: "*.foo"}}', '"*.foo"',
        "these sites have: bert.encoder.layer.0",
    ),
    "nothing for that condition": (
        "E020", 'a: {at: ffn, modify: out, form: bottleneck, where: {if: "d_ff > 999"}}', '"d_ff', "d_ff=64",
    ),
    "no site of that kind": ("E020", "a: {at: conv, modify: out, form: bottleneck}", "conv", "it has: 2 attention ("),
    "another number of sites": ("E021", "a: {at: ffn, modify: out, form: bottleneck, expect: 3}", "3", "peftc sites"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rule_is_told_at_its_place(tiny: Path, place: Path, rule: Write, name: str) -> None:
    code, row, where, words = WRONG[name]
    told = refused(code, "apply", rule(row), tiny)
    column = 3 + row.index(where)
    assert f"mine.yaml:5:{column}\n" in told.replace("'", ""), told
    assert words in told
    assert not list(place.iterdir())


SHAPES = {
    "linear": ('"linear(x, W)"', "[d_out, r]", ["x is [.., d_in]", "W is [d_out, r]"]),
    "matmul": ('"x @ W"', "[r, d_out]", ["x is [.., d_in]", "W is [r, d_out]"]),
    "sum": ('"x + W"', "[r]", ["x is [.., d_in]", "W is [r]"]),
    "composition": ('"linear(x, W)"', "[r, d_in]", ["h is [.., d_out]", "dh is [.., r]"]),
    "numbers": ('"linear(x, W)"', "[7, 7]", ["bert.encoder.layer.0", "d_in=32]", "[7, 7]"]),
}
"""What does not fit whatever the model is told in the rule's names, what the model decides with the module's."""


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shapes_name_both_and_where_they_meet(tiny: Path, place: Path, rule: Write, name: str) -> None:
    form, shape, words = SHAPES[name]
    row = f"a: {{at: ffn, modify: out, form: {form}, params: {{W: {{shape: {shape}, init: zeros}}}}}}"
    told = refused("E013", "apply", rule(row), tiny)
    headline = told.splitlines()[0]
    assert all(word in headline for word in words)
    assert "mine.yaml:5:" in told
    assert not list(place.iterdir())


@pytest.mark.parametrize("value", ["0", "-3", "1e12", "1000000000000", "99999999999999999999999", "2.5", "nan", "abc"])
def test_impossible_sizes_are_refused_before_anything_is_allocated(tiny: Path, place: Path, value: str) -> None:
    start = time.monotonic()
    told = refused("E014", "apply", "mam", tiny, "--set", f"r={value}")
    assert time.monotonic() - start < 20
    assert value in told.splitlines()[0]
    assert not list(place.iterdir())


def test_deltas_far_larger_than_the_base_are_refused(tiny: Path, place: Path) -> None:
    told = refused("E022", "plan", "mam", tiny, "--set", "r=2000000000")
    assert "the base has 23,587" in told


@pytest.mark.parametrize("value", ["0", "-1", "1000000000000"])
def test_impossible_sizes_in_the_file_are_refused(tiny: Path, place: Path, rule: Write, value: str) -> None:
    file = rule("a: {at: ffn, modify: out, form: bottleneck}", hyper=f"{{r: {value}}}")
    assert value in refused("E014", "apply", file, tiny)
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [("q=3", "E015", "known: bias, f, l, r, s"), ("r", "E014", "--set r=64"), ("=3", "E014", "NAME=VALUE")],
)
def test_junk_after_set_is_refused(tiny: Path, place: Path, option: str, code: str, words: str) -> None:
    assert words in refused(code, "apply", "mam", tiny, "--set", option)


def test_duplicate_keys_are_refused(tiny: Path, place: Path, rule: Write) -> None:
    row = "a: {at: ffn, modify: out, form: bottleneck}"
    told = refused("E002", "apply", rule(f"{row}\n  {row}"), tiny)
    assert "mine.yaml:6:3" in told
    assert "first given in line 5" in told


def test_billion_laughs_are_refused_at_once(tiny: Path, place: Path, tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    file = tmp_path / "laughs.yaml"
    file.write_text("\n".join(lines))
    start = time.monotonic()
    refused("E017", "apply", file, tiny)
    assert time.monotonic() - start < 5


def test_unknown_rule_is_refused_with_a_near_name(tiny: Path, place: Path) -> None:
    assert "did you mean `mam`?" in refused("E018", "apply", "mamm", tiny)
    refused("E018", "apply", place, tiny)


def test_every_mistake_of_a_rule_is_told_at_once(tiny: Path, place: Path, rule: Write) -> None:
    told = run("apply", rule("a: {at: fn, modify: out, form: botleneck}"), tiny)
    assert told.code == 2
    assert [line.split(" ")[0] for line in told.stderr.splitlines() if " error: " in line] == ["E005", "E006"]
