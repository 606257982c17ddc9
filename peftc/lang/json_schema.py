"""JSON Schema of rule and form files, for completion and hover text in editors.

Generated from `peftc.lang.schema` and shipped in `rules/schema/`; a rule names it in its first line:

    # yaml-language-server: $schema=schema/rule.schema.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from peftc.checking.families import NAMES
from peftc.lang.library import pattern_names
from peftc.lang.schema import FormFile, PatternFile, RuleFile
from peftc.lang.sites import COMPOSITIONS, INSERTIONS, SITES, TAPS
from peftc.store.heads import HEADS

KINDS = {
    "rule": (RuleFile, "A rule of peftc"),
    "form": (FormFile, "A functional form of peftc"),
    "pattern": (PatternFile, "A pattern of peftc"),
}


def schema_text(kind: str) -> str:
    """The schema of `rule` or `form` files as it is shipped."""
    model, title = KINDS[kind]
    schema = _tidied(model.model_json_schema(by_alias=True))
    _add_words(schema)
    if kind == "rule":
        _admit_parts(schema)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return json.dumps({**head, **schema}, indent=2, ensure_ascii=False) + "\n"


def _tidied(node: Any, *, names: bool = False) -> Any:
    """The schema without generated titles and null defaults, and with every unknown key refused."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:  # the keys are names of fields or models, and a field may well be called `title`
        return {key: _tidied(value) for key, value in node.items()}
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if key != "title" and not (key == "default" and value in (None, "", {}, [])):
            kept[key] = value if key == "default" else _tidied(value, names=key in ("properties", "$defs"))
    if "patternProperties" in kept:
        kept["additionalProperties"] = False
    return kept


def _add_words(schema: dict[str, Any]) -> None:
    """The words an editor can offer, beside any text: a rule's own patterns bring further sites and taps."""
    row = schema["$defs"].get("DeltaFile", {}).get("properties", {})
    case = schema["$defs"].get("CaseFile", {}).get("properties", {})
    if case:
        case["family"] = _closed(case["family"], [*NAMES])
        case["head"] = _closed(case["head"], [*HEADS])
    entry = schema["$defs"].get("RewriteFile", {}).get("properties", {})
    parameter = schema["$defs"].get("ParamFile", {}).get("properties", {})
    for node, key, words in (
        (row, "at", [*SITES, *pattern_names()]),
        (entry, "at", [*SITES, *pattern_names()]),
        (row, "modify", sorted(TAPS)),
        (row, "insert", [*INSERTIONS, *sorted(TAPS)]),
        (row, "compose", ["h + dh", *COMPOSITIONS]),
        (parameter, "init", ["zeros", "ones", "kaiming_uniform", "normal(0.02)"]),
    ):
        if key in node:
            node[key] = _offered(node[key], words)


def _offered(node: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Strings in `node` may be any text, and editors offer `words`."""
    kept = {key: node[key] for key in ("description", "default") if key in node}
    branches = node.get("anyOf") or [{key: value for key, value in node.items() if key not in kept}]
    return {**kept, "anyOf": [{"type": "string", "enum": words}, *branches]}


_PARTS = ("DeltaFile", "ParamFile", "HyperFile", "FormBody", "PatternBody")
"""Models of which a rule that extends another may give a part."""


def _admit_parts(schema: dict[str, Any]) -> None:
    """A rule that extends another may give parts of rows and `null`: what a whole rule requires moves to an `else`."""
    parts = {name: model for name, model in schema["$defs"].items() if name in _PARTS}
    required = _required(schema, parts)
    for model in parts.values():
        model.pop("required", None)
    schema["required"] = ["peftc"]
    _admit_null([schema, *parts.values()])
    schema |= {"if": {"required": ["extends"]}, "else": required}


_REMOVABLE = ("hyper", "deltas", "forms", "patterns", "params", "let")
"""Mappings of names that the extending rule may remove entries of by `null`."""


def _admit_null(models: list[dict[str, Any]]) -> None:
    for model in models:
        for key, field in model["properties"].items():
            for names in (
                part for part in [field, *field.get("anyOf", [])] if key in _REMOVABLE and "patternProperties" in part
            ):
                names["patternProperties"] = {
                    pattern: {**(inner if "anyOf" in inner else {}), "anyOf": [*_branches_of(inner), {"type": "null"}]}
                    for pattern, inner in names["patternProperties"].items()
                }


def _branches_of(node: dict[str, Any]) -> list[dict[str, Any]]:
    return node.get("anyOf", [node])


def _required(node: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """The part of the schema `node` that says which keys must be there; a mapping alone has keys."""
    if "$ref" in node:
        return _required(models.get(node["$ref"].rpartition("/")[2], {}), models)
    found: dict[str, Any] = {"required": node["required"]} if "required" in node else {}
    for part in ("properties", "patternProperties"):
        inner = {key: _required_of_any(value, models) for key, value in node.get(part, {}).items()}
        found |= {part: kept} if (kept := {key: value for key, value in inner.items() if value}) else {}
    return found


def _required_of_any(node: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """What any branch requires: those of the schemas here that are mappings exclude no others."""
    found = [needed for branch in _branches_of(node) if (needed := _required(branch, models))]
    return found[0] if found else {}


def _closed(node: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Every string in `node` must be one of `words`."""
    return _map_strings(node, lambda text: {"type": "string", "enum": words})


def _map_strings(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if isinstance(node, list):
        return [_map_strings(item, change) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "string":
        kept = {key: node[key] for key in ("description", "default") if key in node}
        return {**kept, **change(node)}
    return {key: _map_strings(value, change) for key, value in node.items()}
