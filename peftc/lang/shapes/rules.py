"""What each op makes of the shapes of its operands: a rule of its own here, else its row of `peftc.lang.op_shapes`.

A rule gets the operands (shapes, static values, absent parameters, lists) and gives the shape of the result, as far
as it is known; it raises `Misfit` only where no values of the names make the call work, or a coincidence would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peftc.lang.op_shapes import OP_SHAPES
from peftc.lang.ops import OPS
from peftc.lang.shapes.axes import AXIS_RULES
from peftc.lang.shapes.operands import static_size, tensor
from peftc.lang.shapes.polynomial import constant, divide, extreme, floor_divide, names_of_atom, symbol
from peftc.lang.shapes.signature import signature
from peftc.lang.shapes.terms import UNKNOWN, Absent, Misfit, Shape, Size, Sizes, Static, Value

Rule = Callable[[Sizes, Sequence[Value], Mapping[str, Value]], Value]


def apply(name: str, sizes: Sizes, operands: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
    """The result of a call of the op `name`. Raises `Misfit`."""
    rule = RULES.get(name)
    if rule is not None:
        return rule(sizes, operands, keywords)
    if name not in OP_SHAPES:
        return _extension(name, sizes, operands)
    shapes = [tensor(operands, position) for position in range(len(operands))]
    return signature(OP_SHAPES[name]).apply(sizes, shapes)


def _extension(name: str, sizes: Sizes, operands: Sequence[Value]) -> Value:
    """By the op's own signature, whose operands are the call's first ones; the others may be numbers."""
    told = OPS[name].shapes if name in OPS else ""
    if not told or len(signature(told).operands) > len(operands):
        return UNKNOWN
    count = len(signature(told).operands)
    return signature(told).apply(sizes, [tensor(operands, position) for position in range(count)])


def broadcast(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value] | None = None) -> Value:
    """Of tensors and numbers; a number where there is no tensor."""
    places = [place for place, operand in enumerate(operands) if not isinstance(operand, Static)]
    if not places:
        return Static()
    try:
        return sizes.broadcast([tensor(operands, place) for place in places])
    except Misfit as misfit:
        if not all(isinstance(operands[place], Shape) for place in places):
            raise
        raise Misfit(misfit.reason, *(places[place] for place in misfit.operands)) from None


def _linear(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    x, weight = tensor(operands, 0), tensor(operands, 1)
    if not weight.open and len(weight.sizes) > 2:
        raise Misfit("W has two axes, [out, in]", 1)
    try:
        sizes.same(x.last(1)[0], weight.last(1)[0])
    except Misfit as misfit:
        raise Misfit(misfit.reason, 0, 1, help=_swapped(sizes, x, weight, "linear")) from None
    if weight.open and len(weight.sizes) < 2:
        return UNKNOWN
    if not x.open and not x.sizes:
        raise Misfit("x has no axis", 0)
    vector = not weight.open and len(weight.sizes) == 1
    result = x.lead(1) if vector else x.lead(1).then(weight.last(2)[0])
    if len(operands) > 2 and not isinstance(operands[2], Absent | Static):
        bias = tensor(operands, 2)
        try:
            return sizes.broadcast([result, bias])
        except Misfit as misfit:
            raise Misfit(misfit.reason, 1, 2) from None
    return result


def matmul(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value] | None = None) -> Shape:
    """`a @ b` by torch's rules: a vector is a row on the left and a column on the right."""
    a, b = tensor(operands, 0), tensor(operands, 1)
    if (not a.open and not a.sizes) or (not b.open and not b.sizes):
        raise Misfit("`@` takes tensors of one axis or more", 0, 1)
    if b.open and len(b.sizes) < 2:
        return UNKNOWN
    column = not b.open and len(b.sizes) == 1
    try:
        sizes.same(a.last(1)[0], b.last(1 if column else 2)[0])
        lead = a.lead(1) if column else _batch(sizes, a, b)
    except Misfit as misfit:
        raise Misfit(misfit.reason, 0, 1, help=_swapped(sizes, a, b, "@")) from None
    return lead if column else lead.then(b.last(1)[0])


def _batch(sizes: Sizes, a: Shape, b: Shape) -> Shape:
    """The axes of `a @ b` in front of the last one."""
    if not a.open and len(a.sizes) == 1:
        return b.lead(2)
    if not b.open and len(b.sizes) == 2:
        return a.lead(1)
    if a.open and len(a.sizes) < 2:
        return UNKNOWN
    return sizes.broadcast([a.lead(2), b.lead(2)]).then(a.last(2)[0])


def _swapped(sizes: Sizes, x: Shape, weight: Shape, op: str) -> str | None:
    """What to say where the transpose of the second operand would fit; `{1}` stands for its text."""
    if len(weight.sizes) < 2 or sizes.verdict(x.last(1)[0], weight.last(2)[0 if op == "linear" else 1]) != "same":
        return None
    return f"transpose it? `{op}` takes [{'out, in' if op == 'linear' else 'in, out'}], so `{{1}}.T` fits"


def _einsum(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    equation = operands[0].value if isinstance(operands[0], Static) else None
    if not isinstance(equation, str):
        return UNKNOWN
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms, bound = left.split(","), dict[str, tuple[Size, int]]()
    for position, term in enumerate(terms, 1):
        _bind(sizes, term, tensor(operands, position), position, bound)
    if not arrow:
        result = "".join(sorted(letter for letter in bound if left.count(letter) == 1))
        result = f"...{result}" if "..." in left else result
    for letter in result.replace("...", ""):
        if letter not in bound:
            told = f"`{letter}` stands on the right of the equation alone"
            raise Misfit(told, help="each letter names an axis of an operand")
    front, dots, back = result.rpartition("...")
    known = tuple(bound[letter][0] for letter in back)
    return Shape(known, open=bool(dots or front))


def _bind(sizes: Sizes, term: str, shape: Shape, position: int, bound: dict[str, tuple[Size, int]]) -> None:
    front, dots, back = term.rpartition("...")
    letters = back if dots else term
    if not (front + letters).replace("", "a").isalpha():
        raise Misfit(f"`{term}` is no list of letters", position, help="one letter for an axis: 'bsd,rd->bsr'")
    if not dots and not shape.open and len(shape.sizes) != len(letters):
        raise Misfit(f"`{term}` names {len(letters)} axes, {{{position}}} has {len(shape.sizes)}", position)
    if len(shape.sizes) > len(letters) and not dots:
        raise Misfit(f"`{term}` names {len(letters)} axes, {{{position}}} has more", position)
    for letter in front:
        bound.setdefault(letter, (None, position))
    for letter, size in zip(letters, shape.last(len(letters)), strict=True):
        before, owner = bound.get(letter, (None, position))
        try:
            found = size if letter not in bound else sizes.wide(before, size)
        except Misfit as misfit:
            raise Misfit(f"axis `{letter}`: {misfit.reason}", *dict.fromkeys((owner, position))) from None
        bound[letter] = (found, owner)


def _layer_norm(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    x = tensor(operands, 0)
    for position in (1, 2):
        if isinstance(operands[position], Absent | Static):
            continue
        given = tensor(operands, position)
        if not given.open and len(given.sizes) != 1:
            raise Misfit(f"{{{position}}} must have one axis, the last of {{0}}", position)
        try:
            sizes.same(x.last(1)[0], given.last(1)[0])
        except Misfit as misfit:
            raise Misfit(misfit.reason, 0, position) from None
    return x


def _split_heads(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    x, heads = tensor(operands, 0), static_size(operands[1])
    if not x.open and len(x.sizes) < 2:
        raise Misfit("it must be [.., S, heads * head_dim]", 0)
    rows, width = x.last(2)
    return x.lead(2).then(heads, rows, None if width is None or heads is None else divide(width, heads))


def _scatter(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    try:
        sizes.broadcast([tensor(operands, place) for place in (1, 2, 0)])
    except Misfit as misfit:
        raise Misfit(misfit.reason, *((1, 2, 0)[place] for place in misfit.operands)) from None
    wanted = operands[3]
    return Shape(tuple(static_size(size) for size in wanted)) if isinstance(wanted, list) else UNKNOWN


def _place(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    values, ids = tensor(operands, 0), operands[1]
    if not isinstance(ids, list):
        raise Misfit("{1} is no list", 1, help="a list is a hyperparameter: ids: [11, 12, 40]")
    if values.open:
        return UNKNOWN
    if not values.sizes:
        raise Misfit("{0} has no axis", 0)
    try:
        sizes.same(values.sizes[0], constant(len(ids)))
    except Misfit as misfit:
        raise Misfit(misfit.reason, 0, help=f"{{1}} lists {len(ids)} rows: the first axis is len({{1}})") from None
    return Shape((static_size(operands[2]), *values.sizes[1:]))


def _size(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Static:
    tensor(operands, 0)
    return Static()


def _filled(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    wanted = operands[0]
    return Shape(tuple(static_size(size) for size in wanted)) if isinstance(wanted, list) else UNKNOWN


def _square(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    size = static_size(operands[0])
    return Shape((size, size))


def _vector(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    return Shape((static_size(operands[0]),))


def _diagonal(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    x = _matrix(operands)
    rows, columns = x.last(2)
    return x.lead(2).then(None if rows is None or columns is None else extreme("min", [rows, columns]))


def _triangle(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    return _matrix(operands)


def _matrix(operands: Sequence[Value]) -> Shape:
    x = tensor(operands, 0)
    if not x.open and len(x.sizes) < 2:
        raise Misfit("it must have two axes or more", 0)
    return x


def _skew(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    """The n with n (n - 1) / 2 entries: a number, or a name that the size is made of."""
    x = tensor(operands, 0)
    (count,) = x.last(1)
    side: Size = None
    names = sorted({part for name in count.names for part in names_of_atom(name)}) if count is not None else []
    candidates = [constant(n) for n in range(1, 65)] if not names else [symbol(name) for name in names]
    for n in candidates:
        if count is not None and count == floor_divide(n * (n - constant(1)), constant(2)):
            side = n
    if side is None and count is not None and count.value is not None and count.value <= 64 * 63 // 2:
        raise Misfit(f"{count} is not n (n - 1) / 2 for a whole number n", 0)
    return x.lead(1).then(side, side)


def _orthonormal(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    x = _matrix(operands)
    rows, columns = x.last(2)
    if sizes.more(rows, columns):
        raise Misfit("more rows than columns cannot be orthonormal", 0)
    return x


def _solve(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    """B is a matrix, or a vector where it has one axis; torch takes [b, n] for vectors too where A is [b, n, n]."""
    a, b = tensor(operands, 0), tensor(operands, 1)
    if not b.open and len(b.sizes) == 1:
        return signature("[n, n], [n] -> [n]").apply(sizes, [a, b])
    if not a.open and not b.open and len(b.sizes) == len(a.sizes) - 1:
        return Shape((None,) * len(b.sizes), open=True)
    return signature(OP_SHAPES["solve"]).apply(sizes, [a, b])


def _identity(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Value:
    return operands[0]


def _first(sizes: Sizes, operands: Sequence[Value], _: Mapping[str, Value]) -> Shape:
    return tensor(operands, 0)


RULES: dict[str, Rule] = {
    "linear": _linear,
    "matmul": matmul,
    "einsum": _einsum,
    "split_heads": _split_heads,
    "scatter": _scatter,
    "place": _place,
    "size": _size,
    "zeros": _filled,
    "ones": _filled,
    "full": _filled,
    "eye": _square,
    "range": _vector,
    "diagonal": _diagonal,
    "triu": _triangle,
    "tril": _triangle,
    "skew": _skew,
    "solve": _solve,
    "orthonormal": _orthonormal,
    "ifft_real": broadcast,
    "identity": _identity,
    "clamp": _first,
    "minimum": broadcast,
    "maximum": broadcast,
    "greater": broadcast,
    "less": broadcast,
    "where": broadcast,
    "layer_norm": _layer_norm,
    "rms_norm": broadcast,
    "dropout": _first,
    **AXIS_RULES,
}
