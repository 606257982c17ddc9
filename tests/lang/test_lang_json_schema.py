"""The shipped JSON Schemas: in step with the types, true of every library file, told to editors."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

import pytest

from peftc.diagnostics import Collector, PeftcError
from peftc.lang.json_schema import schema_text
from peftc.lang.loader import parse_rule
from peftc.lang.source import compose
from peftc.lang.tree import plain

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "rules").glob("*.yaml"))
FORMS = sorted((ROOT / "rules" / "forms").glob("*.yaml"))
PATTERNS = sorted((ROOT / "rules" / "patterns").glob("*.yaml"))


def schema(kind: str) -> dict[str, Any]:
    import json

    return json.loads(schema_text(kind))


def mismatches(value: object, node: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """Where `value` does not fit the schema `node`: the part of JSON Schema that the schemas use, and no more."""
    known = {"$ref", "anyOf", "enum", "const", "type", "properties", "patternProperties", "propertyNames", "required"}
    known |= {
        "items",
        "minItems",
        "maxItems",
        "pattern",
        "minLength",
        "minimum",
        "additionalProperties",
        "description",
        "default",
    }
    known |= {"if", "else"}
    assert node.keys() - {"$schema", "$defs", "title"} <= known, node.keys() - known
    if "$ref" in node:
        return mismatches(value, root["$defs"][node["$ref"].rpartition("/")[2]], root, at)
    if "anyOf" in node:
        branches = [mismatches(value, branch, root, at) for branch in node["anyOf"]]
        return [] if [] in branches else min(branches, key=len)
    if ("enum" in node and value not in node["enum"]) or ("const" in node and value != node["const"]):
        return [f"{at}: {value!r}"]
    if (
        "if" in node
        and mismatches(value, node["if"], root, at)
        and (found := mismatches(value, node["else"], root, at))
    ):
        return found
    if "type" not in node:  # of `if` and `else`, which say what a mapping holds and nothing of other values
        return _mapping_mismatches(value, node, root, at) if isinstance(value, dict) else []
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    kind = {**kinds, "object": dict, "array": list}[node["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and node["type"] in ("integer", "number")):
        return [f"{at}: not {node['type']}"]
    if isinstance(value, str):
        fits = len(value) >= node.get("minLength", 0) and re.search(node.get("pattern", ""), value)
        return [] if fits else [f"{at}: {value!r}"]
    if isinstance(value, (int, float)) and value < node.get("minimum", value):
        return [f"{at}: {value}"]
    if isinstance(value, list) and not node.get("minItems", 0) <= len(value) <= node.get("maxItems", len(value)):
        return [f"{at}: {len(value)} items"]
    if isinstance(value, list):
        return [m for i, v in enumerate(value) for m in mismatches(v, node["items"], root, f"{at}[{i}]")]
    return _mapping_mismatches(value, node, root, at) if isinstance(value, dict) else []


def _mapping_mismatches(value: dict[str, object], node: dict[str, Any], root: dict[str, Any], at: str) -> list[str]:
    found = [f"{at}: no {key}" for key in node.get("required", []) if key not in value]
    for key, inner in value.items():
        inside = [p for pattern, p in node.get("patternProperties", {}).items() if re.search(pattern, key)]
        inside += [node["properties"][key]] if key in node.get("properties", {}) else []
        if not inside and node.get("additionalProperties") is False:
            found.append(f"{at}.{key}: unknown")
        for part in inside:
            found += mismatches(inner, part, root, f"{at}.{key}")
    return found


def document(text: str) -> object:
    return plain(compose(text, "t.yaml", Collector()))


@pytest.mark.parametrize("kind", ["rule", "form", "pattern"])
def test_shipped_schema_is_the_one_of_the_types(kind: str) -> None:
    file = importlib.resources.files("peftc.rules").joinpath("schema", f"{kind}.schema.json")
    remedy = f"run: peftc schema {kind} > rules/schema/{kind}.schema.json"
    assert file.read_text(encoding="utf-8") == schema_text(kind), remedy


@pytest.mark.parametrize("path", [*RULES, *FORMS, *PATTERNS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_library_file_fits_its_schema_and_names_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    kind = "form" if path in FORMS else "pattern" if path in PATTERNS else "rule"
    assert mismatches(document(text), schema(kind), schema(kind)) == []
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named, f"{path.name} lacks the first line: # yaml-language-server: $schema=..."
    assert (path.parent / named[1]).resolve() == ROOT / "rules" / "schema" / f"{kind}.schema.json"


ROW = "peftc: 1\nname: t\nhyper: {r: 2}\ndeltas:\n  a: {at: ffn, modify: out, form: bottleneck}\n"


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("peftc: 1", "peftc: 2"),
        ("name: t", "nam: t"),
        ("at: ffn", "at: {kind: ffn}"),
        ("modify: out", "modfy: out"),
        ("form: bottleneck", "form: [x]"),
        ("form: bottleneck", "form: {exp: x}"),
        ("form: bottleneck", "form: bottleneck, where: {layers: first x}"),
        ("form: bottleneck", "form: bottleneck, where: {kind: crss}"),
        ("form: bottleneck", "form: bottleneck, expect: -1"),
        ("form: bottleneck", "form: x, params: {W: {shape: [r]}}"),
        ("{r: 2}", "{3r: 2}"),
        ("deltas:", "patterns: {p: {match: [a = tanh(x)], tap: {}}}\ndeltas:"),
        ("deltas:", "patterns: {p: {lines: [a = tanh(x)]}}\ndeltas:"),
        ("deltas:", "patterns: {p: {match: [a = tanh(x)], shapes: {W: [0]}}}\ndeltas:"),
        ("deltas:", "patterns: {p: {match: [{any: [a = tanh(x)]}]}}\ndeltas:"),
    ],
)
def test_what_the_schema_refuses_the_compiler_refuses(good: str, bad: str) -> None:
    assert mismatches(document(ROW), schema("rule"), schema("rule")) == []
    text = ROW.replace(good, bad)
    assert mismatches(document(text), schema("rule"), schema("rule"))
    with pytest.raises(PeftcError):
        parse_rule(text, "t.yaml")


EXTENDING = (
    "peftc: 1\nextends: lora\nhyper: {alpha: null, r: 4}\ndeltas: {lora: {where: {layers: 0-1}, params: {z: null}}}\n"
)


def test_rule_that_extends_another_may_give_parts_and_null() -> None:
    assert mismatches(document(EXTENDING), schema("rule"), schema("rule")) == []
    alone = EXTENDING.replace("extends: lora", "name: t")
    assert mismatches(document(alone), schema("rule"), schema("rule")) == [
        f".deltas.lora: no {key}" for key in ("at", "modify", "form")
    ]


@pytest.mark.parametrize("kind", ["rule", "form", "pattern"])
def test_every_key_has_hover_text(kind: str) -> None:
    whole = schema(kind)
    for model in (whole, *whole["$defs"].values()):
        assert all(field.get("description") for field in model["properties"].values())


def test_first_line_for_editors_is_not_stored_with_the_rule() -> None:
    line = "# yaml-language-server: $schema=schema/rule.schema.json\n"
    assert parse_rule(line + ROW, "t.yaml").text == ROW
    absolute = "# yaml-language-server: $schema=https://example.org/rule.schema.json\n"
    assert parse_rule(absolute + ROW, "t.yaml").text == absolute + ROW
