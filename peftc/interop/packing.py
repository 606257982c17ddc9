"""Stored tensors out of values of parameters: the views of the table, backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftc.diagnostics import fail
from peftc.interop.reading import cut, whole
from peftc.interop.table import View
from peftc.lang.expr import evaluate_static
from peftc.lang.rule import Expr, Scalar

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter of the delta directory that lies in a stored tensor; `stored` is the shape of a whole one."""

    name: str
    shape: Shape
    dtype: str
    view: View
    sizes: Mapping[str, Scalar]
    stored: tuple[Expr, ...] = ()


def packed_shape(pieces: Sequence[Piece]) -> Shape:
    """The shape of the tensor that `pieces` make."""
    first = pieces[0]
    if first.stored:
        return tuple(int(evaluate_static(size, first.sizes)) for size in first.stored)  # pyright: ignore[reportArgumentType]
    return _box(pieces) if first.view.take else first.shape


def packed(key: str, pieces: Sequence[Piece], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor that `pieces` make. Raises `PeftcError` E083: two of them say different things of one place."""
    import torch

    first = read(pieces[0].name)
    if not pieces[0].view.take and not pieces[0].view.order:
        return first.reshape(packed_shape(pieces))
    box = torch.zeros(_box(pieces), dtype=first.dtype)
    filled = torch.zeros(box.shape, dtype=torch.bool)
    for piece in pieces:
        place, here = cut(piece.view, piece.sizes), filled[cut(piece.view, piece.sizes)]
        value = _turned_back(piece.view, read(piece.name)).reshape(box[place].shape)
        if not torch.equal(box[place][here], value[here]):
            fail("E083", f"{piece.name} differs from what another layer has in {key}", help="PEFT shares it in all")
        box[place] = value
        filled[place] = True
    return box.reshape(packed_shape(pieces))


def _turned_back(view: View, value: torch.Tensor) -> torch.Tensor:
    if not view.order:
        return value
    back = [view.order.index(axis) for axis in range(len(view.order))]
    return value.permute(back)


def _box(pieces: Sequence[Piece]) -> Shape:
    """The smallest shape that holds every piece."""
    view = pieces[0].view
    if view.shape:
        return tuple(whole(size, pieces[0].sizes) for size in view.shape)
    ends: list[list[int]] = []
    for piece in pieces:
        left = iter(piece.shape)
        ends.append([_end(part, left) for part in cut(view, piece.sizes)])
    return tuple(max(axis) for axis in zip(*ends, strict=True))


def _end(part: int | slice, left: object) -> int:
    if isinstance(part, int):
        return part + 1
    size = next(left)  # type: ignore[call-overload]
    return size if part.stop is None else int(part.stop)
