"""Values that a graph holds only together with others, or in another order, are parted in it and joined again.

What is written computes nothing: a part of a value, and the value put together from its parts. The parts are taps.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from peftc.fold.evaluate import as_one, evaluate
from peftc.ir.builder import Builder
from peftc.ir.program import Program, is_call, shape_of
from peftc.locate.projections import Projection
from peftc.locate.walk import DROPOUT, VIEWS, backward, reaches

aten = torch.ops.aten


def split_heads(program: Program, output: Projection, product: fx.Node, heads: int) -> tuple[fx.Node | None, int]:
    """The heads [B, heads, S, d] parted out of what W_o reads, and the axis of `product` that they are there.

    None where more than views lies between, or where no axis of `product` is the heads.
    """
    concat, width = output.x, int(shape_of(product)[-1])
    within = set(backward([concat], lambda node: node is product))
    inner = [node for node in reaches(product, within) if node is not product]
    if output.x_layout != "flat" or not all(is_call(node, *VIEWS, *DROPOUT, aten.slice.Tensor) for node in inner):
        return None, 1
    axis = _head_axis(program, product, concat, heads)
    if axis is None:
        return None, 1
    builder = Builder(program, concat, label="", like=concat)
    rows = concat
    rank = len(shape_of(concat))
    if rank > 3:  # an image's rows and columns are one sequence
        sizes = [builder.size(concat, place) for place in range(rank)]
        rows = builder.call(aten.flatten.using_ints, concat, 1, rank - 2)
    parted = builder.call(aten.unflatten.int, rows, -1, [heads, width])
    found = builder.call(aten.transpose.int, parted, 1, 2)
    joined = builder.call(aten.flatten.using_ints, builder.call(aten.transpose.int, found, 1, 2), -2, -1)
    if rank > 3:
        joined = builder.call(aten.unflatten.int, joined, 1, sizes[1:-1])
    _own(builder)
    output.node.replace_input_with(concat, joined)
    return found, axis


def _head_axis(program: Program, product: fx.Node, concat: fx.Node, heads: int) -> int | None:
    """The axis of the product that becomes the outer part of the last axis of what W_o reads.

    In [B * heads, S, d] it is a part of the first one; with the heads parted it is 1.
    """
    sizes = _sizes(product)
    folded = len(sizes) == 3 and sizes[0] % heads == 0
    wanted = torch.arange(heads, dtype=torch.float64).repeat_interleave(sizes[-1])
    for axis in [0] if folded else range(1, len(sizes) - 2):
        if folded or sizes[axis] == heads:
            numbers = torch.arange(heads, dtype=torch.float64).repeat(sizes[0] // heads if folded else 1)
            numbers = numbers.reshape([-1] + [1] * (len(sizes) - 1 - axis))
            value = _evaluated(program, concat, product, numbers.expand(sizes).contiguous())
            if value is not None and bool((value == wanted).all()):
                return axis or 1
    return None


def columns(program: Program, fused: fx.Node, parts: list[fx.Node]) -> list[fx.Node] | None:
    """Parts of a fused projection [.., width], whatever their axes, as columns of it [.., n].

    None where a part is no run of columns, or two overlap.
    """
    sizes = _sizes(fused)
    numbers = torch.arange(sizes[-1], dtype=torch.float64).expand(sizes).contiguous()
    runs = [_run(_evaluated(program, part, fused, numbers)) for part in parts]
    known = sorted(run for run in runs if run is not None)
    if len(known) < len(parts) or any(a[1] > b[0] for a, b in itertools.pairwise(known)):
        return None
    ends = [0, *(end for run in known for end in run), sizes[-1]]
    builder = Builder(program, fused, label="", like=fused)
    cuts = {
        (first, end): builder.call(aten.slice.Tensor, fused, -1, first, end)
        for first, end in itertools.pairwise(ends)
        if first < end
    }
    joined = builder.call(aten.cat.default, list(cuts.values()), -1)
    _own(builder)
    own = set(builder.nodes)
    fused.replace_all_uses_with(joined, delete_user_cb=lambda user: user not in own)
    return [cuts[run] for run in runs if run is not None]


def _run(numbers: torch.Tensor | None) -> tuple[int, int] | None:
    """The columns that the numbers are, from the first to behind the last, where they follow one another."""
    if numbers is None or numbers.dim() == 0:
        return None
    found = numbers.unique().long()
    first, end = int(found[0]), int(found[-1]) + 1
    inner = numbers[..., 1:] - numbers[..., :-1]
    return (first, end) if end - first == len(found) and bool((inner == 1).all()) else None


def _sizes(node: fx.Node) -> list[int]:
    return [as_one(size) for size in shape_of(node)]


def _evaluated(program: Program, wanted: fx.Node, source: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
    try:
        found: Any = evaluate(program, wanted, {source: value})
    except (RuntimeError, ValueError):  # views that a sequence of one does not fit, or more than views
        return None
    return found


def _own(builder: Builder) -> None:
    """What is written belongs to the base."""
    for written in builder.nodes:
        written.meta.pop("custom")
