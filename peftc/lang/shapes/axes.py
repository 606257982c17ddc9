"""Shape rules of the ops that move, join, drop or run along axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peftc.lang.shapes.operands import axis_of, static_size, tensor, whole
from peftc.lang.shapes.polynomial import ONE, bounded, constant, divide
from peftc.lang.shapes.terms import AXES, UNKNOWN, Misfit, Shape, Size, Sizes, Value, product

Operands = Sequence[Value]
Keywords = Mapping[str, Value]


def transpose(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x = tensor(operands, 0)
    one, two = (axis_of(x, whole(operands[place])) for place in (1, 2))
    return UNKNOWN if one is None or two is None else swapped(x, one, two)


def swapped(x: Shape, one: int, two: int) -> Shape:
    """Two axes, counted from the end, exchanged."""
    found = list(x.sizes)
    found[one], found[two] = found[two], found[one]
    return Shape(tuple(found), x.open)


def _permute(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x, order = tensor(operands, 0), operands[1]
    axes = [whole(axis) for axis in order] if isinstance(order, list) else [None]
    if None in axes or x.open:
        return Shape((None,) * len(axes)) if isinstance(order, list) else UNKNOWN
    found = [axis_of(x, axis) for axis in axes]
    if sorted(axis or 0 for axis in found) != list(range(-len(x.sizes), 0)):
        raise Misfit(f"{{0}} has {len(x.sizes)} axes, and each must be named once", 0)
    return Shape(tuple(x.sizes[axis] for axis in found if axis is not None))


def _wanted(given: Value) -> list[Size] | None:
    """Sizes that are asked for, -1 as the constant."""
    return [static_size(size) for size in given] if isinstance(given, list) else None


_REST = constant(-1)


def _fill(sizes: Sizes, total: Size, wanted: list[Size]) -> tuple[Size, ...]:
    """`wanted` with its -1 worked out. Raises `Misfit` where the counts can never agree."""
    rest = [place for place, size in enumerate(wanted) if size == _REST]
    if len(rest) > 1:
        raise Misfit("-1 stands once, for the rest")
    count = product([size for size in wanted if size != _REST])
    if rest:
        left = None if total is None or count is None else divide(total, count)
        return tuple(left if place in rest else size for place, size in enumerate(wanted))
    lost = {*AXES} & ((total.names if total else frozenset()) - (count.names if count else frozenset()))
    if count is not None and (sizes.verdict(total, count) == "never" or lost):
        raise Misfit(f"{{0}} has {total} entries, and {count} are wanted", 0)
    return tuple(wanted)


def _reshape(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x, wanted = tensor(operands, 0), _wanted(operands[1])
    if wanted is None:
        return UNKNOWN
    try:
        return Shape(_fill(sizes, None if x.open else product(x.sizes), wanted))
    except Misfit as misfit:
        last = [size for size in wanted if size is not None]
        parts = ", ".join(str(size) for size in last)
        several = 1 < len(last) == len(wanted)
        fits = several and sizes.verdict(x.last(1)[0], product(last)) in ("same", "maybe", "by chance")
        whole_axis = f"to part the last axis write unflatten({{0}}, -1, [{parts}])" if fits else None
        raise Misfit(misfit.reason, *misfit.operands, help=whole_axis) from None


def _flatten(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x = tensor(operands, 0)
    first, last = (whole(operands[place]) if len(operands) > place else bound for place, bound in ((1, 0), (2, -1)))
    if first == 0 and last == -1 and x.open:
        return Shape((None,))
    if not x.open and not x.sizes:
        return Shape((ONE,))
    start, stop = axis_of(x, first), axis_of(x, last)
    if start is None or stop is None:
        return UNKNOWN
    if start > stop:
        raise Misfit("the first axis comes after the last", 0)
    count = len(x.sizes)
    joined = product(x.sizes[count + start : count + stop + 1])
    return Shape((*x.sizes[: count + start], joined, *x.sizes[count + stop + 1 :]), x.open)


def _unflatten(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x, wanted = tensor(operands, 0), _wanted(operands[2])
    axis = axis_of(x, whole(operands[1]))
    if axis is None or wanted is None:
        return UNKNOWN
    place = len(x.sizes) + axis
    try:
        parts = _fill(sizes, x.sizes[place], wanted)
    except Misfit as misfit:
        told = f"axis {whole(operands[1])} of {{0}} is {x.sizes[place]}, and {product(wanted)} are wanted"
        raise Misfit(told if misfit.operands else misfit.reason, 0) from None
    return Shape((*x.sizes[:place], *parts, *x.sizes[place + 1 :]), x.open)


def _unsqueeze(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x = tensor(operands, 0)
    axis = axis_of(x, whole(operands[1]), extra=1)
    if axis is None:
        return UNKNOWN
    place = len(x.sizes) + 1 + axis
    return Shape((*x.sizes[:place], ONE, *x.sizes[place:]), x.open)


def _squeeze(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x = tensor(operands, 0)
    axis = axis_of(x, whole(operands[1]))
    if axis is None:
        return UNKNOWN
    place = len(x.sizes) + axis
    if sizes.is_one(x.sizes[place]):
        return Shape((*x.sizes[:place], *x.sizes[place + 1 :]), x.open)
    return Shape(x.sizes[place + 1 :], open=True) if sizes.can_be_one(x.sizes[place]) else x


def _expand(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x, wanted = tensor(operands, 0), _wanted(operands[1])
    if wanted is None:
        return UNKNOWN
    if len(x.sizes) > len(wanted):
        raise Misfit(f"{{0}} has more axes than the {len(wanted)} that are wanted", 0)
    found: list[Size] = []
    for old, new in zip(x.last(len(wanted)), wanted, strict=True):
        if new == _REST:
            found.append(old)
        elif old is None or sizes.can_be_one(old):
            found.append(new)
        else:
            found.append(_stays(sizes, old, new))
    return Shape(tuple(found))


def _stays(sizes: Sizes, old: Size, new: Size) -> Size:
    try:
        return sizes.same(old, new)
    except Misfit as misfit:
        raise Misfit(misfit.reason, 0, help="only axes of size 1 are made longer") from None


def _repeat(sizes: Sizes, operands: Operands, _: Keywords) -> Shape:
    x, counts = tensor(operands, 0), _wanted(operands[1])
    if counts is None:
        return UNKNOWN
    if len(x.sizes) > len(counts):
        raise Misfit(f"{{0}} has more axes than the {len(counts)} counts", 0)
    front = [None if x.open else ONE] * (len(counts) - len(x.sizes))
    return Shape(tuple(product(pair) for pair in zip([*front, *x.sizes], counts, strict=True)))


def _along(sizes: Sizes, operands: Operands, keywords: Keywords) -> Shape:
    """An op that runs along an axis and keeps the shape."""
    x = tensor(operands, 0)
    axis_of(x, whole(keywords["dim"]) if "dim" in keywords else -1)
    return x


def _reduce(sizes: Sizes, operands: Operands, keywords: Keywords) -> Shape:
    x = tensor(operands, 0)
    axis = axis_of(x, whole(keywords["dim"]) if "dim" in keywords else -1)
    if axis is None:
        return Shape((None,) * len(x.sizes), x.open)
    found: list[Size] = list(x.sizes)
    found[axis] = ONE
    return Shape(tuple(found), x.open)


def _alike(sizes: Sizes, shapes: Sequence[Shape], skip: int | None) -> list[Size]:
    """The sizes of tensors that must agree but for the axis `skip`, counted from the end. Raises `Misfit`."""
    count = max(len(shape.sizes) for shape in shapes)
    found: list[Size] = [None] * count
    for position, shape in enumerate(shapes):
        if not shape.open and len(shape.sizes) < count:
            raise Misfit("they differ in their number of axes", *dict.fromkeys((0, position)) if position else (0, 1))
        for place in range(-count, 0):
            size = shape.last(count)[place]
            try:
                found[place] = found[place] if place == skip else sizes.same(found[place], size)
            except Misfit as misfit:
                raise Misfit(misfit.reason, 0, position) from None
    return found


def _concat(sizes: Sizes, operands: Operands, keywords: Keywords) -> Shape:
    shapes = [tensor(operands, position) for position in range(len(operands))]
    index = whole(keywords["dim"]) if "dim" in keywords else -1
    known = next((shape for shape in shapes if not shape.open), shapes[0])
    axis = axis_of(known, index)
    if axis is None:
        return UNKNOWN
    found = _alike(sizes, shapes, axis)
    total: Size = constant(0)
    for shape in shapes:
        part = shape.last(-axis)[0]
        total = None if total is None or part is None else bounded(total + part)
    if -axis <= len(found):
        found[axis] = total
    return Shape(tuple(found), all(shape.open for shape in shapes))


def _stack(sizes: Sizes, operands: Operands, keywords: Keywords) -> Shape:
    shapes = [tensor(operands, position) for position in range(len(operands))]
    found = Shape(tuple(_alike(sizes, shapes, None)), all(shape.open for shape in shapes))
    axis = axis_of(found, whole(keywords["dim"]) if "dim" in keywords else 0, extra=1)
    if axis is None:
        return UNKNOWN
    place = len(found.sizes) + 1 + axis
    return Shape((*found.sizes[:place], constant(len(shapes)), *found.sizes[place:]), found.open)


def _gather(sizes: Sizes, operands: Operands, keywords: Keywords) -> Shape:
    x, index = tensor(operands, 0), operands[1]
    axis = axis_of(x, whole(keywords["dim"]) if "dim" in keywords else -1)
    if axis is None:
        return UNKNOWN
    found: list[Size] = list(x.sizes) if x.sizes else [None]
    if isinstance(index, list):
        found[axis] = constant(len(index))
    else:
        places = tensor(operands, 1)
        if len(places.sizes) > 1:
            raise Misfit("the index is a list or a vector", 1)
        found[axis] = places.last(1)[0]
    return Shape(tuple(found), x.open)


AXIS_RULES: dict[str, Callable[[Sizes, Operands, Keywords], Shape]] = {
    "transpose": transpose,
    "permute": _permute,
    "reshape": _reshape,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "roll": _along,
    "flip": _along,
    "softmax": _along,
    "cumsum": _along,
    "fft_real": _along,
    "fft_imag": _along,
    "concat": _concat,
    "stack": _stack,
    "gather": _gather,
    **dict.fromkeys(("logsumexp", "mean", "sum", "amax", "amin", "norm"), _reduce),
}
