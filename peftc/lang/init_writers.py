"""How the ops of `init:` are written as torch.fx nodes: one row of `INIT_WRITERS` for one of `peftc.lang.ops.INIT_OPS`.

A singular value decomposition and a QR leave signs open; here each left singular vector has its entry of largest
magnitude positive, and R has no negative diagonal, so that a start is the same wherever it is computed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from peftc.ir.builder import Builder

aten = torch.ops.aten


def _matrix(x: fx.Node) -> tuple[int, int]:
    shape = tuple(x.meta["val"].shape)
    if len(shape) != 2:
        raise ValueError(f"a matrix is needed, and this has {len(shape)} axes")
    return shape[0], shape[1]


def _signs(builder: Builder, values: fx.Node) -> fx.Node:
    """1 where a value is not negative, else -1."""
    return builder.call(aten.where.Scalar, builder.call(aten.ge.Scalar, values, 0), 1.0, -1.0)


def _svd(builder: Builder, x: fx.Node, rank: Any) -> tuple[fx.Node, fx.Node, fx.Node]:
    """U [m, r], S [r], Vᵀ [r, n], signs fixed."""
    most = min(_matrix(x))
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(f"a matrix of {list(_matrix(x))} has 1 to {most} singular values to ask for, not {rank}")
    parts = builder.call(aten.linalg_svd.default, x, False)
    u, s, vt = (builder.call(operator.getitem, parts, index) for index in range(3))
    place = builder.call(aten.argmax.default, builder.call(aten.abs.default, u), 0, True)
    signs = _signs(builder, builder.call(aten.gather.default, u, 0, place))  # [1, k]
    u = builder.call(aten.mul.Tensor, u, signs)
    vt = builder.call(aten.mul.Tensor, vt, builder.call(aten.transpose.int, signs, 0, 1))
    cut = aten.slice.Tensor
    return builder.call(cut, u, 1, 0, rank), builder.call(cut, s, 0, 0, rank), builder.call(cut, vt, 0, 0, rank)


def _svd_part(index: int) -> Callable[..., fx.Node]:
    return lambda builder, x, rank: _svd(builder, x, rank)[index]


def _qr(builder: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    _matrix(x)
    parts = builder.call(aten.linalg_qr.default, x)
    q, r = builder.call(operator.getitem, parts, 0), builder.call(operator.getitem, parts, 1)
    signs = _signs(builder, builder.call(aten.diagonal.default, r))
    rows = builder.call(aten.unsqueeze.default, signs, 1)
    return builder.call(aten.mul.Tensor, q, signs), builder.call(aten.mul.Tensor, r, rows)


def _places(builder: Builder, x: fx.Node, count: Any) -> fx.Node:
    """The places in the flat tensor of the entries of largest magnitude; of equal ones the first."""
    size = math.prod(x.meta["val"].shape)
    if type(count) is not int or not 1 <= count <= size:
        raise ValueError(f"there are {size} entries to choose from, not {count}")
    flat = builder.call(aten.abs.default, builder.call(aten.reshape.default, x, [-1]))
    order = builder.call(aten.sort.stable, flat, stable=True, dim=0, descending=True)
    return builder.call(aten.slice.Tensor, builder.call(operator.getitem, order, 1), 0, 0, count)


def _topk(builder: Builder, x: fx.Node, count: Any) -> fx.Node:
    flat = builder.call(aten.reshape.default, x, [-1])
    return builder.call(aten.index_select.default, flat, 0, _places(builder, x, count))


def _topk_axis(axis: int) -> Callable[..., fx.Node]:
    def write(builder: Builder, x: fx.Node, count: Any) -> fx.Node:
        places, width = _places(builder, x, count), _matrix(x)[1]
        if axis == 0:
            places = builder.call(aten.div.Tensor_mode, places, width, rounding_mode="floor")
        else:
            places = builder.call(aten.remainder.Scalar, places, width)
        return builder.call(aten.mul.Tensor, places, 1.0)

    return write


def _topk_mask(builder: Builder, x: fx.Node, count: Any) -> fx.Node:
    flat = builder.call(aten.zeros_like.default, builder.call(aten.reshape.default, x, [-1]))
    marked = builder.call(aten.index_fill.int_Scalar, flat, 0, _places(builder, x, count), 1.0)
    return builder.call(aten.reshape.default, marked, list(x.meta["val"].shape))


def _sort(builder: Builder, x: fx.Node, dim: int = -1) -> fx.Node:
    return builder.call(operator.getitem, builder.call(aten.sort.default, x, dim), 0)


INIT_WRITERS: dict[str, Callable[..., Any]] = {
    "svd_u": _svd_part(0),
    "svd_s": _svd_part(1),
    "svd_vt": _svd_part(2),
    "qr_q": lambda b, x: _qr(b, x)[0],
    "qr_r": lambda b, x: _qr(b, x)[1],
    "sort": _sort,
    "topk": _topk,
    "topk_rows": _topk_axis(0),
    "topk_columns": _topk_axis(1),
    "topk_mask": _topk_mask,
}
