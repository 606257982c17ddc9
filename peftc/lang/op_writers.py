"""How each op of a rule's expressions is written as torch.fx nodes: one row of `WRITERS` for one of `peftc.lang.ops`.

A writer takes the builder and the op's arguments, nodes or static values, and gives the node of the result. Constants
(`eye`, `range`, the indices of `circulant`) are made in the graph, and follow the dtype and the device of the delta.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from peftc.diagnostics import did_you_mean, fail
from peftc.ir.builder import Builder
from peftc.lang.extensions import extension_ops, load_writer, told, unusable

aten = torch.ops.aten

Value = Any
"""fx.Node, int, float, bool, str, None, or a list of those."""


def _unary(target: Any) -> Callable[..., fx.Node]:
    return lambda builder, x: builder.call(target, x)


def _reduce(target: Any) -> Callable[..., fx.Node]:
    return lambda builder, x, dim=-1: builder.call(target, x, [dim], True)


def _shape(x: fx.Node) -> list[Any]:
    return list(x.meta["val"].shape)


def _device(builder: Builder) -> torch.device:
    return next(iter(builder.program.placeholders("parameter").values())).meta["val"].device


def _arange(builder: Builder, size: int) -> fx.Node:
    return builder.call(aten.arange.default, size, dtype=torch.int64, device=_device(builder))


def _parameter(builder: Builder) -> fx.Node | None:
    """The widest parameter of the delta: what is made in the graph has its dtype and its device when that runs.

    Of several the nearest to the site, for a block that runs by itself has no other's parameters.
    """
    delta = builder.label.partition(".")[0]
    own = {name: p.dtype for name, p in builder.program.delta_parameters.items() if p.delta == delta}
    widest = max(own, key=lambda name: (own[name].itemsize, _shared(name, builder.path)), default=None)
    return None if widest is None else builder.program.placeholders("parameter")[widest]


def _shared(name: str, path: str) -> int:
    """How many parts two dotted names begin with alike."""
    pairs = zip(name.split("."), path.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _full(builder: Builder, sizes: list[Value], number: float, like: fx.Node | None = None) -> fx.Node:
    like = _parameter(builder) if like is None else like
    if like is None:
        return builder.call(aten.full.default, sizes, float(number), device=_device(builder))
    return builder.call(aten.new_full.default, like, sizes, number)


def _concat(builder: Builder, *parts: fx.Node, dim: int = -1) -> fx.Node:
    """Whole numbers joined to others become what the others are; said in the graph, for ONNX joins only equal types."""
    dtype = functools.reduce(torch.promote_types, (part.meta["val"].dtype for part in parts))
    return builder.call(aten.cat.default, [builder.cast(part, dtype) for part in parts], dim)


def _eye(builder: Builder, size: int) -> fx.Node:
    return builder.call(aten.diag_embed.default, _full(builder, [size], 1))


def _range(builder: Builder, size: int) -> fx.Node:
    return builder.call(aten.mul.Tensor, _full(builder, [1], 1), _arange(builder, size))


def _block_diag(builder: Builder, x: fx.Node) -> fx.Node:
    """Each block times its row of the identity: [.., k, m, 1, n] * [k, 1, k, 1], the axes then joined in pairs."""
    mask = builder.call(aten.reshape.default, _eye(builder, _shape(x)[-3]), [_shape(x)[-3], 1, _shape(x)[-3], 1])
    spread = builder.call(aten.mul.Tensor, builder.call(aten.unsqueeze.default, x, -2), mask)
    return builder.call(aten.flatten.using_ints, builder.call(aten.flatten.using_ints, spread, -4, -3), -2, -1)


def _integers(builder: Builder, x: fx.Node) -> fx.Node:
    """x cut to whole numbers. Written with an example of the dtype: a fold computes `to.dtype` in its own dtype."""
    return builder.call(aten.to.other, x, _arange(builder, 1))


def _split_heads(builder: Builder, x: fx.Node, heads: int) -> fx.Node:
    width = _shape(x)[-1] // heads
    return builder.call(aten.transpose.int, builder.call(aten.unflatten.int, x, -1, [heads, width]), -3, -2)


def _merge_heads(builder: Builder, x: fx.Node) -> fx.Node:
    return builder.call(aten.flatten.using_ints, builder.call(aten.transpose.int, x, -3, -2), -2, -1)


def _layer_norm(builder: Builder, x: fx.Node, weight: Value, bias: Value, eps: float = 1e-5) -> fx.Node:
    return builder.call(aten.layer_norm.default, x, [_shape(x)[-1]], weight, bias, eps, False)


def _rms_norm(builder: Builder, x: fx.Node, weight: Value, eps: float = 1e-6) -> fx.Node:
    square = builder.call(aten.mean.dim, builder.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    scale = builder.call(aten.rsqrt.default, builder.call(aten.add.Tensor, square, eps))
    return builder.call(aten.mul.Tensor, builder.call(aten.mul.Tensor, x, scale), weight)


def _linear(builder: Builder, x: fx.Node, weight: fx.Node, bias: Value = None) -> fx.Node:
    return builder.call(aten.linear.default, x, weight, bias)


def _dropout(builder: Builder, x: fx.Node, p: float) -> fx.Node:
    return builder.call(aten.dropout.default, x, float(p), True) if p else x


def _extreme(static: Callable[..., Any], target: Any, bounds: str) -> Callable[..., Value]:
    """The smallest or largest of tensors and numbers, which broadcast."""

    def write(builder: Builder, *values: Value) -> Value:
        nodes = [value for value in values if isinstance(value, fx.Node)]
        numbers = [value for value in values if not isinstance(value, fx.Node)]
        if not nodes:
            return static(numbers)
        result = nodes[0]
        for node in nodes[1:]:
            result = builder.call(target, result, node)
        return builder.call(aten.clamp.default, result, **{bounds: static(numbers)}) if numbers else result

    return write


def _where(builder: Builder, mask: fx.Node, one: Value, other: Value) -> fx.Node:
    chosen = builder.call(aten.ne.Scalar, mask, 0)
    if isinstance(one, fx.Node):
        target = aten.where.self if isinstance(other, fx.Node) else aten.where.ScalarOther
    else:
        target = aten.where.ScalarSelf if isinstance(other, fx.Node) else aten.where.Scalar
    return builder.call(target, chosen, one, other)


def _compare(target: Any) -> Callable[..., fx.Node]:
    def write(builder: Builder, a: fx.Node, b: Value) -> fx.Node:
        overload = target.Tensor if isinstance(b, fx.Node) else target.Scalar
        return builder.call(aten.mul.Tensor, builder.call(overload, a, b), 1.0)

    return write


def _kron(builder: Builder, a: fx.Node, b: fx.Node) -> fx.Node:
    """Of the last two axes; the leading ones broadcast."""
    rows, columns = (_shape(a)[axis] * _shape(b)[axis] for axis in (-2, -1))
    left = builder.call(aten.reshape.default, a, [*_shape(a)[:-1], 1, _shape(a)[-1], 1])
    right = builder.call(aten.reshape.default, b, [*_shape(b)[:-2], 1, _shape(b)[-2], 1, _shape(b)[-1]])
    product = builder.call(aten.mul.Tensor, left, right)
    return builder.call(aten.reshape.default, product, [*_shape(product)[:-4], rows, columns])


def _gather(builder: Builder, x: fx.Node, index: Value, dim: int = -1) -> fx.Node:
    if not isinstance(index, list):
        if index.meta["val"].dim() > 1:  # torch refuses it only when it runs
            raise IndexError("the index is a list or a vector")
        return builder.call(aten.index_select.default, x, dim, _integers(builder, index))
    size, axis = _shape(x)[dim], dim % x.meta["val"].dim()
    if not index or not all(isinstance(i, int) and -size <= i < size for i in index):
        raise IndexError(f"the indices are whole numbers from {-size} to {size - 1}")
    runs = _runs([i % size for i in index])
    return builder.call(aten.cat.default, [builder.call(aten.slice.Tensor, x, axis, *run) for run in runs], dim)


def _runs(index: list[int]) -> list[tuple[int, int]]:
    """The index as ranges, each from a number to one before another: 4, 5, 6, 2 as (4, 7), (2, 3)."""
    found: list[tuple[int, int]] = []
    for i in index:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def _place(builder: Builder, values: fx.Node, ids: Value, count: int) -> fx.Node:
    """The rows as ranges joined in the graph, which holds no constant of its own."""
    if not isinstance(ids, list):
        raise TypeError("`place` takes a list, such as a hyperparameter ids: [11, 12, 40]")
    if wrong := [i for i in ids if not 0 <= i < count]:
        raise IndexError(f"there are rows 0 to {count - 1}, and {wrong[0]} is none of them")
    if len(ids) != _shape(values)[0] or len(set(ids)) < len(ids):
        raise IndexError(f"{len(ids)} rows are listed, each once, for {_shape(values)[0]} values")
    device = _device(builder)
    parts = [builder.call(aten.arange.start, *run, dtype=torch.int64, device=device) for run in _runs(ids)]
    index = parts[0] if len(parts) == 1 else builder.call(aten.cat.default, parts, 0)
    zeros = builder.call(aten.new_zeros.default, values, [count, *_shape(values)[1:]])
    return builder.call(aten.index_put.default, zeros, [index], values)


def _scatter(builder: Builder, values: fx.Node, rows: fx.Node, columns: fx.Node, sizes: list[int]) -> fx.Node:
    zeros = builder.call(aten.new_zeros.default, values, sizes)
    places = [_integers(builder, rows), _integers(builder, columns)]
    return builder.call(aten.index_put.default, zeros, places, values, True)


def _circulant(builder: Builder, w: fx.Node) -> fx.Node:
    size = _shape(w)[-1]
    ahead = builder.call(aten.unsqueeze.default, _arange(builder, size), 0)
    turned = builder.call(aten.sub.Tensor, ahead, builder.call(aten.unsqueeze.default, _arange(builder, size), 1))
    flat = builder.call(aten.reshape.default, builder.call(aten.remainder.Scalar, turned, size), [size * size])
    return builder.call(aten.unflatten.int, builder.call(aten.index_select.default, w, -1, flat), -1, [size, size])


def _skew(builder: Builder, v: fx.Node) -> fx.Node:
    """v fills the upper triangle row by row: entry (i, j), i < j, is v[i n - i (i + 1) / 2 + j - i - 1]."""
    count = int(_shape(v)[-1])
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size * (size - 1) // 2 != count:
        raise ValueError(f"skew takes n (n - 1) / 2 numbers for an n by n matrix, not {count}")
    down = builder.call(aten.unsqueeze.default, _arange(builder, size), 1)
    across = builder.call(aten.unsqueeze.default, _arange(builder, size), 0)
    low, high = builder.call(aten.minimum.default, down, across), builder.call(aten.maximum.default, down, across)
    # i n - i (i + 1) / 2 - i - 1 + j, in whole numbers: (i (2 n - 3 - i) + 2 j - 2) / 2
    factor = builder.call(aten.add.Tensor, builder.call(aten.neg.default, low), 2 * size - 3)
    double = builder.call(aten.add.Tensor, builder.call(aten.mul.Tensor, low, factor), high, alpha=2)
    place = builder.call(aten.div.Tensor_mode, builder.call(aten.add.Tensor, double, -2), 2, rounding_mode="floor")
    place = builder.call(aten.clamp.default, place, 0)  # the diagonal, which the sign makes zero
    flat = builder.call(aten.reshape.default, place, [size * size])
    picked = builder.call(aten.unflatten.int, builder.call(aten.index_select.default, v, -1, flat), -1, [size, size])
    sign = builder.call(aten.sign.default, builder.call(aten.sub.Tensor, across, down))
    return builder.call(aten.mul.Tensor, picked, sign)


def _orthonormal(builder: Builder, x: fx.Node) -> fx.Node:
    """Gram and Schmidt, by QR of the transpose; the signs are such that orthonormal rows stay as they are."""
    if _shape(x)[-2] > _shape(x)[-1]:
        raise ValueError(f"{_shape(x)[-2]} rows of {_shape(x)[-1]} numbers cannot be orthonormal")
    both = builder.call(aten.linalg_qr.default, builder.call(aten.transpose.int, x, -2, -1))
    q, r = builder.call(operator.getitem, both, 0), builder.call(operator.getitem, both, 1)
    signs = builder.call(aten.sign.default, builder.call(aten.diagonal.default, r, 0, -2, -1))
    columns = builder.call(aten.mul.Tensor, q, builder.call(aten.unsqueeze.default, signs, -2))
    return builder.call(aten.transpose.int, columns, -2, -1)


def _solve(builder: Builder, a: fx.Node, b: fx.Node) -> fx.Node:
    return builder.call(aten.linalg_solve.default, a, b)


def _fft(part: Any) -> Callable[..., fx.Node]:
    def write(builder: Builder, x: fx.Node, dim: int = -1) -> fx.Node:
        return builder.call(part, builder.call(aten.fft_fft.default, x, None, dim))

    return write


def _ifft_real(builder: Builder, real: fx.Node, imaginary: Value = None, dim: int = -1) -> fx.Node:
    spectrum = real if imaginary is None else builder.call(aten.complex.default, real, imaginary)
    return builder.call(aten.real.default, builder.call(aten.fft_ifft.default, spectrum, None, dim))


def _ifft2_real(builder: Builder, x: fx.Node) -> fx.Node:
    return builder.call(aten.real.default, builder.call(aten.fft_ifft2.default, x))


WRITERS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": lambda b, x, y: b.call(aten.matmul.default, x, y),
    "einsum": lambda b, spec, *xs: b.call(aten.einsum.default, spec, list(xs)),
    "outer": lambda b, x, y: b.call(aten.outer.default, x, y),
    "kron": _kron,
    "transpose": lambda b, x, i, j: b.call(aten.transpose.int, x, i, j),
    "permute": lambda b, x, axes: b.call(aten.permute.default, x, axes),
    "reshape": lambda b, x, sizes: b.call(aten.reshape.default, x, sizes),
    "flatten": lambda b, x, first=0, last=-1: b.call(aten.flatten.using_ints, x, first, last),
    "unflatten": lambda b, x, axis, sizes: b.call(aten.unflatten.int, x, axis, sizes),
    "unsqueeze": lambda b, x, axis: b.call(aten.unsqueeze.default, x, axis),
    "squeeze": lambda b, x, axis: b.call(aten.squeeze.dim, x, axis),
    "expand": lambda b, x, sizes: b.call(aten.expand.default, x, sizes),
    "repeat": lambda b, x, counts: b.call(aten.repeat.default, x, counts),
    "roll": lambda b, x, shift, dim=-1: b.call(aten.roll.default, x, [shift], [dim]),
    "flip": lambda b, x, dim=-1: b.call(aten.flip.default, x, [dim]),
    "concat": _concat,
    "stack": lambda b, *xs, dim=0: b.call(aten.stack.default, list(xs), dim),
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "gather": _gather,
    "scatter": _scatter,
    "place": _place,
    "size": lambda b, x, axis: b.size(x, axis),
    "zeros": lambda b, sizes: _full(b, sizes, 0),
    "ones": lambda b, sizes: _full(b, sizes, 1),
    "full": _full,
    "eye": _eye,
    "range": _range,
    "diag": lambda b, x: b.call(aten.diag_embed.default, x),
    "block_diag": _block_diag,
    "diagonal": lambda b, x: b.call(aten.diagonal.default, x, 0, -2, -1),
    "triu": lambda b, x, k=0: b.call(aten.triu.default, x, k),
    "tril": lambda b, x, k=0: b.call(aten.tril.default, x, k),
    "skew": _skew,
    "circulant": _circulant,
    "orthonormal": _orthonormal,
    "solve": _solve,
    "inverse": _unary(aten.linalg_inv.default),
    "fft_real": _fft(aten.real.default),
    "fft_imag": _fft(aten.imag.default),
    "ifft_real": _ifft_real,
    "ifft2_real": _ifft2_real,
    "relu": _unary(aten.relu.default),
    "gelu": _unary(aten.gelu.default),
    "gelu_tanh": lambda b, x: b.call(aten.gelu.default, x, approximate="tanh"),
    "silu": _unary(aten.silu.default),
    "tanh": _unary(aten.tanh.default),
    "sigmoid": _unary(aten.sigmoid.default),
    "softplus": _unary(aten.softplus.default),
    "identity": lambda b, x: x,
    "softmax": lambda b, x, dim=-1: b.call(aten.softmax.int, x, dim),
    "logsumexp": _reduce(aten.logsumexp.default),
    "exp": _unary(aten.exp.default),
    "log": _unary(aten.log.default),
    "sin": _unary(aten.sin.default),
    "cos": _unary(aten.cos.default),
    "sqrt": _unary(aten.sqrt.default),
    "rsqrt": _unary(aten.rsqrt.default),
    "abs": _unary(aten.abs.default),
    "sign": _unary(aten.sign.default),
    "floor": _unary(aten.floor.default),
    "round": _unary(aten.round.default),
    "clamp": lambda b, x, low, high: b.call(aten.clamp.default, x, low, high),
    "minimum": _extreme(min, aten.minimum.default, "max"),
    "maximum": _extreme(max, aten.maximum.default, "min"),
    "greater": _compare(aten.gt),
    "less": _compare(aten.lt),
    "where": _where,
    "mean": _reduce(aten.mean.dim),
    "sum": _reduce(aten.sum.dim_IntList),
    "cumsum": lambda b, x, dim=-1: b.call(aten.cumsum.default, x, dim),
    "amax": _reduce(aten.amax.default),
    "amin": _reduce(aten.amin.default),
    "norm": lambda b, x, dim=-1: b.call(aten.linalg_vector_norm.default, x, 2, [dim], True),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "dropout": _dropout,
    "detach": _unary(aten.detach.default),
}


def write_op(name: str, builder: Builder, *args: Value, **kwargs: Value) -> Value:
    """The value of an op, of the library or of an extension, as its writer writes it.

    Raises `PeftcError`: E007 for an op that is none, E045 for one of an extension that cannot be used. What torch says
    of operands that do not fit goes through.
    """
    if name in WRITERS:
        return WRITERS[name](builder, *args, **kwargs)
    known = extension_ops()
    if name not in known.items:
        fail("E007", f"unknown op `{name}`", help=did_you_mean(name, [*WRITERS, *known.items]))
    op, origin = known.items[name], known.origin(name)
    write = load_writer(op, origin)
    try:
        value = write(builder, *args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        raise
    except Exception as error:  # noqa: BLE001 -- foreign code: any other exception is a bug of the package
        unusable(origin, f"the writer of `{name}` raised {told(error)}")
    if not isinstance(value, fx.Node):
        unusable(origin, f"the writer of `{name}` gives a {type(value).__name__}, not a node of the graph")
    return value
