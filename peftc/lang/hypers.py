"""Hyperparameters: their values in the file, the values set from outside, their bounds, and the resolved source.

`resolve` reads `hyper:` with `sets` applied; `rewrite` puts the set values into the YAML text, touching nothing
else, so that loading the result gives the same rule.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.complaints import shown
from peftc.lang.emit import written
from peftc.lang.reading import value, word
from peftc.lang.rule import Hyper, Scalar
from peftc.lang.tree import MAX_DIGITS, MappingNode, Node, ScalarNode, resolve_plain

SIZES = frozenset({"r", "l"})
"""Names that are sizes wherever they stand."""

_BOUND = "change the value, or the bound under `hyper:`"
_SIZE = "a size is a whole number from 1 on, as in r: 8"
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def resolve(node: Node | None, sets: Mapping[str, object], collector: Collector) -> dict[str, Hyper]:
    """The hyperparameters of a rule: defaults, then `sets`; E014 (wrong value) and E015 (unknown name)."""
    entries = node.entries if isinstance(node, MappingNode) else {}
    for name in sets:
        if name not in entries:
            help = did_you_mean(str(name), entries) or "this rule has no hyperparameters"
            collector.error("E015", f"`--set {shown(str(name))}`: the rule has no such hyperparameter", help=help)
    found: dict[str, Hyper] = {}
    for name, (_, entry) in entries.items():
        hyper = _hyper(name, entry)
        if hyper is None:
            continue
        if name in sets:
            hyper = _set(hyper, _scalar(entry), sets[name], collector)
        found[name] = hyper
        _check_bounds(hyper, collector)
    return found


def rewrite(text: str, node: Node | None, hypers: Mapping[str, Hyper], dropped: tuple[int, int] | None = None) -> str:
    """`text` with the values of `hypers` in place of the defaults that differ, and without the part `dropped`."""
    edits: list[tuple[int, int, str]] = [] if dropped is None else [(*dropped, "")]
    for name, (_, entry) in node.entries.items() if isinstance(node, MappingNode) else ():
        scalar = _scalar(entry)
        if scalar is not None and name in hypers and not _same(scalar.value, hypers[name].value):
            tail = "\n" if text[scalar.start : scalar.end].endswith("\n") else ""
            edits.append((scalar.start, scalar.end, written(hypers[name].value) + tail))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def with_values(node: Node | None, hypers: Mapping[str, Hyper]) -> Node | None:
    """The tree of `hyper:` with the values of `hypers` in place of the defaults that differ; see `rewrite`."""
    if not isinstance(node, MappingNode):
        return node
    entries = dict(node.entries)
    for name, (key, entry) in node.entries.items():
        scalar = _scalar(entry)
        if scalar is None or name not in hypers or _same(scalar.value, hypers[name].value):
            continue
        value = hypers[name].value
        new = ScalarNode(written(value), value, scalar.span, scalar.start, scalar.end, exact=False)
        if isinstance(entry, MappingNode):
            inner = {**entry.entries, "default": (entry.key("default"), new)}
            entries[name] = (key, MappingNode(inner, entry.span, entry.size))
        else:
            entries[name] = (key, new)
    return MappingNode(entries, node.span, node.size)


def check_size(hyper: Hyper, collector: Collector, *, whole: bool) -> None:
    """E014 unless `hyper`, which a shape uses, is at least 1 (and a whole number when it is a size by itself)."""
    size = hyper.value
    if isinstance(size, bool) or not isinstance(size, (int, float)) or (whole and isinstance(size, float)):
        if whole:
            message = f"`{hyper.name}` is a size and must be a whole number, not {_shown(size)}"
            collector.error("E014", message, span=hyper.span, help=_SIZE)
    elif isinstance(size, int) and size < 1:
        message = f"`{hyper.name}` is {size}, but a size must be at least 1"
        collector.error("E014", message, span=hyper.span, help=_SIZE)


def _hyper(name: str, entry: Node) -> Hyper | None:
    scalar = _scalar(entry)
    if scalar is None or scalar.value is None:
        return None
    low, high = (_bound(entry.get(key)) if isinstance(entry, MappingNode) else None for key in ("min", "max"))
    doc = word(entry.get("doc")) if isinstance(entry, MappingNode) else None
    return Hyper(name, scalar.value, low, high, doc or "", scalar.span)


def _scalar(entry: Node) -> ScalarNode | None:
    default = entry.get("default") if isinstance(entry, MappingNode) else entry
    return default if isinstance(default, ScalarNode) else None


def _bound(node: Node | None) -> float | None:
    bound = value(node)
    return bound if isinstance(bound, (int, float)) else None


def _set(hyper: Hyper, node: ScalarNode | None, given: object, collector: Collector) -> Hyper:
    """`hyper` with the value `given`, as the type of its default."""
    if node is not None and node.shared:
        message = f"`{hyper.name}` cannot be set: an anchor shares its value with other places"
        collector.error("E014", message, span=hyper.span, help="write the value without `&`")
        return hyper
    converted = _converted(given, type(hyper.value))
    if converted is None:
        kind = _KINDS[type(hyper.value)]
        message = f"`--set {hyper.name}={shown(str(given))}`: `{hyper.name}` must be {kind}"
        collector.error("E014", message, span=hyper.span)
        return hyper
    return Hyper(hyper.name, converted, hyper.min, hyper.max, hyper.doc, hyper.span)


def _converted(given: object, kind: type) -> Scalar:
    """`given` (typed, or text from a command line) as `kind`; None when it is not one."""
    if isinstance(given, str) and kind is not str:
        given = resolve_plain(given.strip())
    if kind is str:
        return given if isinstance(given, str) and given and given.isprintable() and len(given) <= 200 else None
    if kind is bool or isinstance(given, bool):
        return given if kind is bool and isinstance(given, bool) else None
    if kind is int:
        return int(given) if isinstance(given, numbers.Integral) and abs(int(given)) < 10 ** (MAX_DIGITS - 1) else None
    if not isinstance(given, numbers.Real):
        return None
    try:
        number = float(given)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _check_bounds(hyper: Hyper, collector: Collector) -> None:
    if isinstance(hyper.value, (bool, str)) or hyper.value is None:
        if hyper.min is not None or hyper.max is not None:
            message = f"`{hyper.name}` is {_shown(hyper.value)}, which has no `min` or `max`"
            collector.error("E014", message, span=hyper.span, help="bounds are for numbers: take them out")
        if hyper.name not in SIZES:
            return
    elif hyper.min is not None and hyper.max is not None and hyper.min > hyper.max:
        message = f"`{hyper.name}` can have no value: `min` is {hyper.min}, `max` is {hyper.max}"
        collector.error("E014", message, span=hyper.span, help="exchange the bounds, or take one out")
        return
    elif hyper.min is not None and hyper.value < hyper.min:
        message = f"`{hyper.name}` is {hyper.value}, but must be at least {hyper.min}"
        collector.error("E014", message, span=hyper.span, help=_BOUND)
        return
    elif hyper.max is not None and hyper.value > hyper.max:
        message = f"`{hyper.name}` is {hyper.value}, but must be at most {hyper.max}"
        collector.error("E014", message, span=hyper.span, help=_BOUND)
        return
    if hyper.name in SIZES:
        check_size(hyper, collector, whole=True)


def _same(left: Scalar, right: Scalar) -> bool:
    return left == right and type(left) is type(right)


def _shown(value: Scalar) -> str:
    if isinstance(value, str):
        return f"the word `{shown(value)}`"
    return str(value).lower()
