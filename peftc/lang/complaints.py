"""Pydantic's errors, tidied: one complaint for each mistake, with its path and place in the located tree.

A union reports one error for each of its branches, and puts branch names into the path. Here path elements that
the tree does not have are dropped, errors of shallower branches give way to deeper ones, and what is left at one
place is joined ("a number or a word").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftc.diagnostics import Span, did_you_mean
from peftc.lang.tree import MappingNode, Node, ScalarNode, SequenceNode

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a word",
    "string_too_short": "a word",
    "list_type": "a list",
    "dict_type": "a mapping of `key: value`",
    "model_type": "a mapping of `key: value`",
}
_ORDER = ("a whole number", "a number", "true or false", "a word", "a list", "a mapping of `key: value`")


@dataclass(frozen=True, slots=True)
class Complaint:
    """One mistake at one place."""

    code: str
    path: Path
    message: str
    span: Span | None
    help: str | None = None


def complaints(tree: MappingNode, errors: Sequence[ErrorDetails]) -> list[Complaint]:
    """The distinct mistakes behind pydantic's `errors` about `plain(tree)`."""
    located = [(_path(tree, error), error) for error in errors]
    above = {path[:length] for path, _ in located for length in range(len(path))}
    groups: dict[Path, list[ErrorDetails]] = {}
    for path, error in located:
        if path not in above:
            groups.setdefault(path, []).append(error)
    return [_complaint(tree, path, group) for path, group in groups.items()]


def node_at(tree: Node, path: Path) -> Node | None:
    """The node at `path`, if there is one."""
    node: Node | None = tree
    for step in path:
        if isinstance(node, MappingNode):
            node = node.get(str(step))
        elif isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            return None
    return node


def _path(tree: MappingNode, error: ErrorDetails) -> Path:
    """The error's `loc` without the names of union branches; a missing key is its path's last element."""
    node: Node = tree
    path: Path = ()
    loc = error["loc"]
    for step in loc:
        inner = node_at(node, (step,))
        if inner is not None:
            node, path = inner, (*path, step)
    return (*path, loc[-1]) if error["type"] == "missing" else path


def _complaint(tree: MappingNode, path: Path, group: list[ErrorDetails]) -> Complaint:
    kinds = {error["type"] for error in group}
    name, key = _shown_path(path), path[-1] if path else ""
    if "missing" in kinds:
        owner = f" of `{path[-2]}`" if len(path) > 1 else ""
        return Complaint("E010", path, f"missing key `{key}`{owner}", _key_span(tree, path[:-1]))
    if "extra_forbidden" in kinds:
        help = None
        if ")" in name and "(" not in name:
            help = "inside `{ }`, quote an expression that holds a comma"
        return Complaint("E003", path, f"unknown key `{name}`", _key_span(tree, path), help)
    if any(error["loc"][-1] == "[key]" for error in group) and path[-2:-1] == ("layers",):
        help = "as in 0, -1, 0-5, first 4 or last 2"
        return Complaint("E009", path, f"`{name}` names no layer", _key_span(tree, path), help)
    if any(error["loc"][-1] == "[key]" for error in group):
        message = f"`{name}` is not a name"
        help = "a name is letters, digits and _, and starts with no digit"
        return Complaint("E009", path, message, _key_span(tree, path), help)
    node = node_at(tree, path)
    got, span = _got(node), node.span if node else None
    help = None
    for error in group:
        if error["type"] == "literal_error" and isinstance(node, ScalarNode):
            near = did_you_mean(node.text, _choices(error)) or ""
            help = near if near.startswith("did") else help
    return Complaint("E009", path, f"`{name}` must be {_expected(group)}, not {got}", span, help)


def _expected(group: list[ErrorDetails]) -> str:
    wanted: list[str] = []
    for error in group:
        if error["type"] == "literal_error":
            choices = _choices(error)
            text = choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
        elif error["type"] in ("too_short", "too_long"):
            text = _length(error)
        elif error["type"] == "greater_than_equal":
            text = f"at least {error.get('ctx', {}).get('ge')}"
        elif error["type"] == "string_pattern_mismatch":
            percent = "%" in str(error.get("ctx", {}).get("pattern"))
            text = "a percentage such as 0.5%" if percent else 'like "0-5", "first 4" or "last 2"'
        else:
            text = _EXPECTED.get(error["type"], "of another type")
        if text not in wanted:
            wanted.append(text)
    if "a number" in wanted and "a whole number" in wanted:
        wanted.remove("a whole number")
    if {"a number", "true or false", "a word"} <= set(wanted):
        wanted = ["a single value", *(text for text in wanted if text not in ("a number", "true or false", "a word"))]
    wanted.sort(key=lambda text: _ORDER.index(text) if text in _ORDER else -1)
    return wanted[0] if len(wanted) == 1 else f"{', '.join(wanted[:-1])} or {wanted[-1]}"


def _length(error: ErrorDetails) -> str:
    least, most = (error.get("ctx", {}).get(key) for key in ("min_length", "max_length"))
    if most is not None:
        return f"a list of at most {most}"
    return "a list of two or more" if least == 2 else "a list of at least one"


def _choices(error: ErrorDetails) -> list[str]:
    quoted = str(error.get("ctx", {}).get("expected", ""))
    return [word.strip().strip("'") for word in quoted.replace(" or ", ", ").split(",") if word.strip()]


def _got(node: Node | None) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if not isinstance(node, ScalarNode):
        return "a mapping"
    if node.value is None:
        return "nothing"
    if isinstance(node.value, str):
        return f"`{shown(node.value)}`" if node.value else "an empty word"
    return str(node.value).lower()


def shown(word: str) -> str:
    """A word of the user's, short enough for a message."""
    line = " ".join(word.split())
    return line if len(line) <= 40 else line[:37] + "..."


def _shown_path(path: Path) -> str:
    last = [str(step) for step in path if isinstance(step, str)]
    return shown(last[-1]) if last else "the file"


def _key_span(tree: MappingNode, path: Path) -> Span | None:
    """The place of the key that `path` ends with."""
    if not path:
        return next((key.span for key, _ in tree.entries.values()), tree.span)
    owner, key = node_at(tree, path[:-1]), path[-1]
    if isinstance(owner, MappingNode) and isinstance(key, str) and key in owner.entries:
        return owner.key(key).span
    node = node_at(tree, path)
    return node.span if node else None
