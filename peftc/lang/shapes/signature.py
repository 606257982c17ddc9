"""Signatures: the shapes of an op written as a pattern, which is its doc and its rule at once.

    [.., n, n], [.., n, k] -> [.., n, k]

A name stands for one size wherever it appears; `..` are axes in front that broadcast among the operands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from peftc.lang.shapes.polynomial import constant
from peftc.lang.shapes.terms import Misfit, Shape, Size, Sizes, product

_SHAPE = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class _Pattern:
    """`[.., a, b]`: an open pattern has a `..` in front. Each size is factors, names or numbers."""

    open: bool
    sizes: tuple[tuple[str, ...], ...]
    text: str

    def takes(self, shape: Shape) -> bool:
        """Whether a tensor of that rank fits."""
        count = len(shape.sizes)
        if shape.open:
            return self.open or count <= len(self.sizes)
        return count >= len(self.sizes) if self.open else count == len(self.sizes)


@dataclass(frozen=True, slots=True)
class Signature:
    """The operands' patterns and the result's."""

    operands: tuple[_Pattern, ...]
    result: _Pattern

    def apply(self, sizes: Sizes, shapes: Sequence[Shape]) -> Shape:
        """The result's shape. Raises `Misfit` with the operands that disagree."""
        bound: dict[str, tuple[Size, int]] = {}
        leads: list[Shape] = []
        for position, (pattern, shape) in enumerate(zip(self.operands, shapes, strict=True)):
            if not pattern.takes(shape):
                raise Misfit(f"it must be {pattern.text}", position)
            for (name,), size in zip(pattern.sizes, shape.last(len(pattern.sizes)), strict=True):
                before, owner = bound.get(name, (None, position))
                try:
                    bound[name] = sizes.same(before, size), owner
                except Misfit as misfit:
                    raise Misfit(misfit.reason, *dict.fromkeys((owner, position))) from None
            if pattern.open:
                leads.append(shape.lead(len(pattern.sizes)))
        lead = sizes.broadcast(leads) if leads and self.result.open else Shape()
        return lead.then(*(_value(factors, bound) for factors in self.result.sizes))


@lru_cache(maxsize=256)
def signature(text: str) -> Signature:
    """The signature that `text` is. Raises `ValueError` where it is none."""
    operands, arrow, result = text.partition("->")
    patterns = [_pattern(part) for part in _SHAPE.findall(operands)]
    results = [_pattern(part) for part in _SHAPE.findall(result)]
    plain = all(len(size) == 1 for pattern in patterns for size in pattern.sizes)
    if not arrow or not patterns or len(results) != 1 or not plain:
        raise ValueError(f"`{text}` is no signature")
    return Signature(tuple(patterns), results[0])


def _pattern(text: str) -> _Pattern:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    is_open = parts[:1] == [".."]
    sizes = tuple(tuple(part.split(" * ")) for part in parts[is_open:])
    return _Pattern(is_open, sizes, f"[{text}]")


def _value(factors: tuple[str, ...], bound: dict[str, tuple[Size, int]]) -> Size:
    return product([constant(int(factor)) if factor.isdigit() else bound[factor][0] for factor in factors])
