"""Reading YAML with places: values by YAML 1.2, spans at the token, hostile files refused fast."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from peftc.diagnostics import Collector, PeftcError
from peftc.lang.source import MAX_BYTES, compose, read_text
from peftc.lang.tree import MappingNode, Node, plain, resolve_plain


def tree(text: str) -> Node:
    collector = Collector()
    node = compose(text, "t.yaml", collector)
    collector.raise_if_errors()
    return node


def codes(text: str) -> list[str]:
    with pytest.raises(PeftcError) as raised:
        tree(text)
    return [diagnostic.code for diagnostic in raised.value.diagnostics]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-5", -5),
        ("0x10", 16),
        ("0o10", 8),
        ("010", 10),
        (".5", 0.5),
        ("4.", 4.0),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("Y", "Y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2022-01-01", "2022-01-01"),
        ("=", "="),
        ("<<", "<<"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_scalar_follows_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    found = resolve_plain(text)
    assert found == value
    assert type(found) is type(value)


def test_quoted_scalars_stay_words() -> None:
    assert plain(tree("{a: '1', b: \"true\", c: |\n  2\n}".replace("c: |\n  2\n", "c: '~'"))) == {
        "a": "1",
        "b": "true",
        "c": "~",
    }


def test_span_of_a_value_is_its_token() -> None:
    node = tree("hyper:\n  r: {default: 'abc', min: 1}\n")
    assert isinstance(node, MappingNode)
    hyper = node.get("hyper")
    assert isinstance(hyper, MappingNode)
    r = hyper.get("r")
    assert isinstance(r, MappingNode)
    default = r.entries["default"][1]
    assert (default.span.line, default.span.col, default.span.end_col) == (2, 16, 21)
    assert (default.inner.col, default.inner.end_col) == (17, 20)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\x85", "\u2028"])
def test_lines_are_counted_as_yaml_counts_them(newline: str) -> None:
    node = tree(newline.join(["a: 1", "b: 2", "c: 3"]))
    assert isinstance(node, MappingNode)
    assert node.key("c").span.line == 3
    assert node.key("c").span.text == "c: 3"


def test_duplicate_keys_are_all_told() -> None:
    assert codes("a: 1\na: 2\nb: {c: 1, c: 2, 'c': 3}\n") == ["E002"] * 3


@pytest.mark.parametrize("text", ["!!int 3", "! x", "!<tag:x,2000:y> x", "!!python/name:os.system ''", "&a !!str x"])
def test_every_explicit_tag_is_refused(text: str) -> None:
    assert codes(f"a: {text}\n") == ["E016"]


def test_tags_are_refused_in_keys_and_collections() -> None:
    assert codes("!!str a: !!map {b: !!seq [1]}\n") == ["E016"] * 3


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "[" * 100_000,
        "{a: " * 60_000,
        "- " * 100_000,
        "a: &a [*a]",
        "a: &a {b: {c: *a}}",
        "[" + "x, " * 80_000 + "]",
        "a: &a 1\nb: [" + "*a, " * 100 + "]",
        "x" * (MAX_BYTES + 1),
    ],
    ids=["aliases", "brackets", "braces", "dashes", "self", "cycle", "many", "many-aliases", "large"],
)
def test_hostile_yaml_is_refused_quickly(text: str) -> None:
    start = time.perf_counter()
    assert codes(text) == ["E017"]
    assert time.perf_counter() - start < 5


def test_few_aliases_are_welcome() -> None:
    assert plain(tree("a: &a {r: 1}\nb: *a\n")) == {"a": {"r": 1}, "b": {"r": 1}}


@pytest.mark.parametrize(
    "text", ["", "# only a comment", "a: 'x", "a: b: c", "\ta: 1", "a: \x00", 'a: "\\x1b"', 'a: "\\ud800"', "[1, 2"]
)
def test_unreadable_text_is_told(text: str) -> None:
    assert codes(text) == ["E001"]


def test_file_that_is_not_utf8_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("peftc: 1\nname: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(PeftcError) as raised:
        read_text(path, "latin.yaml")
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "E001"
    assert str(diagnostic.span) == "latin.yaml:2:10"


def test_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(PeftcError, match="E017"):
        read_text(path)


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert plain(tree(read_text(path))) == {"a": 1}
