"""Values of parameters out of stored tensors, by the views of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftc.interop.table import View
from peftc.lang.expr import evaluate_static
from peftc.lang.rule import Expr, Scalar

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of a tensor of the delta directory come from."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    view: View | None = None
    sizes: Mapping[str, Scalar] | None = None


def viewed_shape(view: View, stored: Shape, sizes: Mapping[str, Scalar]) -> Shape | None:
    """The shape of what `view` shows of a tensor of shape `stored`; None where it does not fit."""
    shape = tuple(whole(size, sizes) for size in view.shape) or stored
    if math.prod(shape) != math.prod(stored):
        return None
    if view.take:
        parts = cut(view, sizes)
        if len(parts) > len(shape) or any(not _within(part, size) for part, size in zip(parts, shape, strict=False)):
            return None
        left = [len(range(size)[part]) for part, size in zip(parts, shape, strict=False) if isinstance(part, slice)]
        shape = (*left, *shape[len(parts) :])
    return tuple(shape[axis] for axis in view.order) if view.order else shape


def viewed(view: View, tensor: torch.Tensor, sizes: Mapping[str, Scalar]) -> torch.Tensor:
    """What `view` shows of a tensor; shares its memory where it can."""
    if view.shape:
        tensor = tensor.reshape([whole(size, sizes) for size in view.shape])
    if view.take:
        tensor = tensor[cut(view, sizes)]
    return tensor.permute(view.order) if view.order else tensor


def cut(view: View, sizes: Mapping[str, Scalar]) -> tuple[int | slice, ...]:
    """Which entries of each axis `view` takes; () for all of all."""
    return tuple(_part(part, sizes) for part in view.take)


def _part(part: Expr | tuple[Expr, Expr] | None, sizes: Mapping[str, Scalar]) -> int | slice:
    if part is None:
        return slice(None)
    if isinstance(part, tuple):
        return slice(whole(part[0], sizes), whole(part[1], sizes))
    return whole(part, sizes)


def _within(part: int | slice, size: int) -> bool:
    return part.stop is None or part.stop <= size if isinstance(part, slice) else 0 <= part < size


def whole(size: Expr, sizes: Mapping[str, Scalar]) -> int:
    """The value of a size."""
    value = evaluate_static(size, sizes)
    assert isinstance(value, int), size.text
    return value
