"""Hyperparameters: their values in the file, the values set from outside, their bounds, and values of single layers.

hyper:
  r: {default: 8, min: 1, layers: {0: 16, last 2: 32}}     # --set r=4 replaces the 8 alone
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import replace

from peftc.diagnostics import Collector, did_you_mean
from peftc.lang.amounts import amount, budget_of
from peftc.lang.complaints import shown
from peftc.lang.layers import selector
from peftc.lang.reading import value, word
from peftc.lang.rule import Budget, Hyper, LayerValue, Scalar, in_words
from peftc.lang.schema import MAX_ITEMS
from peftc.lang.tree import MAX_DIGITS, MappingNode, Node, ScalarNode, SequenceNode, resolve_plain

SIZES = frozenset({"r", "l"})
"""Names that are sizes wherever they stand."""

MAX_WORD = 1000
"""Characters of a word that is set: the length of a path, say."""

_BOUND = "change the value, or the bound under `hyper:`"
_SIZE = "a size is a whole number from 1 on, as in r: 8"
_LIST = "distinct whole numbers with commas between them, as in 11,12,40"
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    tuple: "a list of whole numbers",
}


def resolve(node: Node | None, sets: Mapping[str, object], collector: Collector) -> dict[str, Hyper]:
    """The hyperparameters of a rule: defaults, then `sets`; E014 (wrong value) and E015 (unknown name)."""
    entries = node.entries if isinstance(node, MappingNode) else {}
    for name in sets:
        if name not in entries:
            help = did_you_mean(str(name), entries) or "this rule has no hyperparameters"
            collector.error("E015", f"`--set {shown(str(name))}`: the rule has no such hyperparameter", help=help)
    found: dict[str, Hyper] = {}
    for name, (_, entry) in entries.items():
        hyper = _hyper(name, entry, collector)
        if hyper is None:
            continue
        if name in sets:
            hyper = _set(hyper, amount(entry)[1], sets[name], collector)
        found[name] = hyper
        _check_bounds(hyper, collector)
        for one in layer_hypers(hyper):
            _check_bounds(one, collector)
    _one_budget(found, collector)
    return found


def check_entries(node: Node | None, collector: Collector) -> None:
    """E010 for each entry of `hyper:`, as it is written, without an amount, and E003 for one with two."""
    for name, (key, entry) in node.entries.items() if isinstance(node, MappingNode) else ():
        if not isinstance(entry, MappingNode):
            continue
        given = [word for word in ("default", "budget") if word in entry.entries]
        if not given and not entry.entries.keys() - {"min", "max", "doc", "layers"}:  # a misspelt key is told already
            message, help = f"missing key `default` (or `budget`) of `{name}`", "`default` is the value without --set"
            collector.error("E010", message, span=key.span, help=help)
        elif len(given) > 1:
            later = max((entry.key(word) for word in given), key=lambda found: found.start)
            message = f"`{name}` has `default` or `budget`, not both"
            collector.error("E003", message, span=later.span, help="take one of them out; --set gives either")


def layer_hypers(hyper: Hyper) -> list[Hyper]:
    """The hyperparameter as it is in the layers that have a value of their own, one for each."""
    return [replace(hyper, value=given.value, span=given.span, layers=(), budget=None) for given in hyper.layers]


def _one_budget(found: Mapping[str, Hyper], collector: Collector) -> None:
    first, *more = [hyper for hyper in found.values() if hyper.budget is not None] or [None]
    for hyper in more:
        assert first is not None and hyper is not None and hyper.budget is not None
        message = f"`{hyper.name}` has a budget, and so has `{first.name}`: one number cannot fix two"
        collector.error("E052", message, span=hyper.budget.span, help="give one of them a value")


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


def _hyper(name: str, entry: Node, collector: Collector) -> Hyper | None:
    key, scalar = amount(entry)
    if scalar is None or scalar.value is None:
        return None
    low, high = (_bound(entry.get(key)) if isinstance(entry, MappingNode) else None for key in ("min", "max"))
    doc = word(entry.get("doc")) if isinstance(entry, MappingNode) else None
    hyper = Hyper(name, scalar.value, low, high, doc or "", scalar.span)
    if key is not None and key.text == "budget":
        hyper = _within(hyper, budget_of(scalar.value, scalar.inner))
        if hyper.budget is None:
            message = f"`{name}` has a budget of nothing, {_shown(scalar.value)}"
            collector.error("E014", message, span=scalar.span, help="as in 0.5%, or a number of parameters")
    layers = entry.get("layers") if isinstance(entry, MappingNode) else None
    return replace(hyper, layers=_layers(hyper, layers, collector)) if isinstance(layers, MappingNode) else hyper


def _within(hyper: Hyper, budget: Budget | None) -> Hyper:
    """`hyper` with a budget; its value is the smallest that the budget may come to."""
    return replace(hyper, value=max(1, math.ceil(hyper.min or 1)), budget=budget)


def _layers(hyper: Hyper, node: MappingNode, collector: Collector) -> tuple[LayerValue, ...]:
    """The values of single layers; E009 for a selector that names no layer, E014 for a value of another type."""
    found: list[LayerValue] = []
    kind = type(hyper.value)
    if kind is tuple:
        message, help = f"`{hyper.name}` is a list, which is the same in every layer", "take `layers` out"
        collector.error("E014", message, span=node.span, help=help)
        return ()
    for key, item in node.entries.values():
        layers, given = selector(key.text), value(item)
        if layers is None:
            message, help = f"`{shown(key.text)}` names no layer", "as in 0, -1, 0-5, first 4 or last 2"
            collector.error("E009", message, span=key.span, help=help)
        elif (isinstance(given, str) and kind is not str) or (converted := _converted(given, kind)) is None:
            message = f"`{hyper.name}` must be {_KINDS[kind]} in every layer, not {_shown(given)}"
            collector.error("E014", message, span=item.span, help=f"its type is that of the default, {hyper.shown}")
        else:
            found.append(LayerValue(" ".join(key.text.split()), layers, converted, item.span))
    return tuple(found)


def _bound(node: Node | None) -> float | None:
    bound = value(node)
    return bound if isinstance(bound, (int, float)) else None


def _set(hyper: Hyper, node: ScalarNode | None, given: object, collector: Collector) -> Hyper:
    """`hyper` with the value `given`, as the type of its default."""
    if node is not None and node.shared:
        message = f"`{hyper.name}` cannot be set: an anchor shares its value with other places"
        collector.error("E014", message, span=hyper.span, help="write the value without `&`")
        return hyper
    budget = budget_of(given, node.inner if node else None) if isinstance(given, str) else None
    if budget is not None and type(hyper.value) is int:
        return _within(hyper, budget)
    converted = _converted(given, type(hyper.value))
    if converted is None:
        kind = _KINDS[type(hyper.value)]
        text = ",".join(map(str, given)) if isinstance(given, (list, tuple)) else str(given)
        message = f"`--set {hyper.name}={shown(text)}`: `{hyper.name}` must be {kind}"
        listed = "a list is for a hyperparameter whose default is one" if isinstance(given, (list, tuple)) else None
        collector.error("E014", message, span=hyper.span, help=_LIST if kind == _KINDS[tuple] else listed)
        return hyper
    return replace(hyper, value=converted, budget=None, given=True)


def _converted(given: object, kind: type) -> Scalar:
    """`given` (typed, a path, or text from a command line) as `kind`; None when it is not one."""
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    if kind is tuple or isinstance(given, (list, tuple)):
        return _items(given) if kind is tuple else None
    if isinstance(given, str) and kind is not str:
        given = resolve_plain(given.strip())
    if kind is str:
        return given if isinstance(given, str) and given and given.isprintable() and len(given) <= MAX_WORD else None
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


def written_value(node: Node) -> Scalar:
    """What a value in a test says: a scalar's value, or the whole numbers of a list."""
    scalar = amount(node)[1] if isinstance(node, (ScalarNode, SequenceNode)) else None
    return scalar.value if scalar is not None else None


def _items(given: object) -> tuple[int, ...] | None:
    """A list, or the text of one (`11,12,40`, which may stand in brackets), as whole numbers."""
    if isinstance(given, str):
        text = given.strip()
        text = text[1:-1] if text[:1] + text[-1:] == "[]" else text
        if len(text) > 2 * MAX_DIGITS * MAX_ITEMS:
            return None
        given = [resolve_plain(part.strip()) for part in text.split(",")]
    if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= MAX_ITEMS:
        return None
    found = [_converted(item, int) if not isinstance(item, str) else None for item in given]
    whole = tuple(item for item in found if isinstance(item, int))
    return whole if len(whole) == len(given) else None


def _check_items(hyper: Hyper, items: tuple[int, ...], collector: Collector) -> None:
    """E014 for an item that stands twice, and for the first one beyond the bounds."""
    low, high = (-math.inf if hyper.min is None else hyper.min), (math.inf if hyper.max is None else hyper.max)
    twice = next((item for at, item in enumerate(items) if item in items[:at]), None)
    if low > high:
        _no_value(hyper, collector)
    elif twice is not None:
        message = f"`{hyper.name}` lists {twice} twice"
        collector.error("E014", message, span=hyper.span, help="name each number once")
    elif (wrong := next((item for item in items if not low <= item <= high), None)) is not None:
        bound = f"at least {hyper.min}" if wrong < low else f"at most {hyper.max}"
        message = f"`{hyper.name}` lists {wrong}, but each number must be {bound}"
        collector.error("E014", message, span=hyper.span, help=_BOUND)


def _no_value(hyper: Hyper, collector: Collector) -> None:
    message = f"`{hyper.name}` can have no value: `min` is {hyper.min}, `max` is {hyper.max}"
    collector.error("E014", message, span=hyper.span, help="exchange the bounds, or take one out")


def _check_bounds(hyper: Hyper, collector: Collector) -> None:
    if isinstance(hyper.value, tuple):
        _check_items(hyper, hyper.value, collector)
    elif isinstance(hyper.value, (bool, str)) or hyper.value is None:
        if hyper.min is not None or hyper.max is not None:
            message = f"`{hyper.name}` is {_shown(hyper.value)}, which has no `min` or `max`"
            collector.error("E014", message, span=hyper.span, help="bounds are for numbers: take them out")
        if hyper.name not in SIZES:
            return
    elif hyper.min is not None and hyper.max is not None and hyper.min > hyper.max:
        _no_value(hyper, collector)
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


def _shown(value: Scalar) -> str:
    if isinstance(value, str):
        return f"the word `{shown(value)}`"
    if isinstance(value, tuple):
        return f"the list {in_words(value)}"
    return str(value).lower()
