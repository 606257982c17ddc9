"""Reading the operands of a call: tensors, sizes, whole numbers, and axes counted from the end."""

from __future__ import annotations

from collections.abc import Sequence

from peftc.lang.shapes.terms import Absent, Misfit, Shape, Size, Static, Value


def tensor(operands: Sequence[Value], position: int) -> Shape:
    """The operand at `position`, which must be a tensor. Raises `Misfit`."""
    found = operands[position]
    if isinstance(found, Shape):
        return found
    if isinstance(found, Absent):
        told = f"{{{position}}} is absent, for its `if: {found.condition}` is false"
        raise Misfit(told, position, help=f"read it only where it is there: `... if {found.condition} else ...`")
    if isinstance(found, list):
        raise Misfit(f"{{{position}}} is a list, where a tensor is wanted", position)
    what = "a word" if found.known and isinstance(found.value, str) else "a number"
    raise Misfit(f"{{{position}}} is {what}, where a tensor is wanted", position)


def static_size(found: Value) -> Size:
    """A number as a size; None for anything else."""
    return found.size if isinstance(found, Static) else None


def whole(found: Value | None) -> int | None:
    """The whole number that `found` is known to be."""
    value = found.value if isinstance(found, Static) and found.known else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def axis_of(shape: Shape, index: int | None, *, extra: int = 0) -> int | None:
    """`index` as an axis counted from the end, -1 the last; None where it is not known. Raises `Misfit`.

    `extra` axes more are admitted, for an axis that is yet to be made.
    """
    count = len(shape.sizes) + extra
    scalar = not count and not shape.open and index in (-1, 0)  # torch takes either for a tensor without axes
    if index is None or scalar or (shape.open and not -count <= index < 0):
        return None
    if not -count <= index < count:
        raise Misfit(f"{{0}} has {len(shape.sizes)} ax{'i' if len(shape.sizes) == 1 else 'e'}s, so no axis {index}", 0)
    return index if index < 0 else index - count
