"""Selectors of layers: a number (negative ones count from the end), `A-B`, `first N`, `last N`.

They stand under `where.layers` of a row and under `layers` of a hyperparameter.

    >>> sorted(layer_set(selector("last 2"), 12)), sorted(layer_set(selector("-12"), 12))
    ([10, 11], [0])
"""

from __future__ import annotations

import re

Layers = tuple[int, ...] | str
"""Indices (negative ones count from the end), or "first N", "last N", "A-B"."""

RANGE = r"[0-9]{1,6}\s*-\s*[0-9]{1,6}|(first|last)\s+[0-9]{1,6}"
_SELECTOR = re.compile(rf"\s*(?:(?P<one>-?[0-9]{{1,6}})|(?P<range>{RANGE}))\s*")


def selector(text: str) -> Layers | None:
    """The layers that `text` names; None when it is no selector or can name no layer, such as `5-2` or `first 0`."""
    match = _SELECTOR.fullmatch(text)
    if match is None:
        return None
    if match["one"]:
        return (int(match["one"]),)
    low, dash, high = match["range"].partition("-")
    if dash:
        return f"{int(low)}-{int(high)}" if int(low) <= int(high) else None
    word, count = match["range"].split()
    return f"{word} {int(count)}" if int(count) else None


def layer_set(layers: Layers | None, count: int) -> set[int]:
    """Those of the layers 0 to `count` - 1 that are meant."""
    if layers is None:
        return set(range(count))
    if isinstance(layers, str):
        word, _, rest = layers.partition(" ")
        if word == "first":
            return set(range(min(int(rest), count)))
        if word == "last":
            return set(range(max(0, count - int(rest)), count))
        low, _, high = layers.partition("-")
        return set(range(int(low), min(int(high) + 1, count)))
    return {index + count if index < 0 else index for index in layers} & set(range(count))


def shown_layers(layers: set[int]) -> str:
    """Layers in words: `layers 0, 10-11`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"
