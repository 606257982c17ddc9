"""Zero at the start: which deltas leave the model's outputs as they are before any training.

An abstract interpretation of a delta's subgraph with three values: zero, h itself, anything else. Parameters whose
`init` is zero are zero; products with zero are zero; h plus zero is h. A parameter that starts as a copy of another
(`init: A`) is numbered as that one, so that the difference of equal values is zero. What this proves holds bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import fx

from peftc.ir.program import DeltaParameter, Insertion, Program, is_call, operand

aten = torch.ops.aten


class Value(Enum):
    """What is known of a node at the start."""

    ZERO = "zero"
    H = "h"
    OTHER = "other"


_ODD = (
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.neg.default, aten.abs.default,
    aten.sign.default, aten.sqrt.default, aten.dropout.default,
)  # fmt: skip
"""Functions with f(0) = 0."""

_SHAPES = (
    aten.to.dtype, aten.clone.default, aten.transpose.int, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int, aten.slice.Tensor, aten.select.int,
    aten.expand.default, aten.mean.dim, aten.sum.dim_IntList,
)  # fmt: skip

_RANDOM = (aten.dropout.default, aten.rand_like.default, aten.bernoulli.default)

_PRODUCTS = (aten.mul.Tensor, aten.matmul.default, aten.einsum.default)


def starts_as_identity(program: Program, insertion: Insertion) -> bool:
    """Whether h' is h, bit for bit, with every parameter at its initial value."""
    if insertion.lowering in ("concat", "prepend"):
        return False
    values: dict[fx.Node, Value] = {insertion.before: Value.H}
    placeholders = program.placeholders("parameter")
    numbers: dict[fx.Node, Any] = {}
    for name, node in placeholders.items():
        parameter = program.delta_parameters.get(name)
        if parameter is not None:
            source = _source(parameter)
            numbers[node] = placeholders.get(source.name, node)
            if source.init.is_zero:
                values[node] = Value.ZERO
    for node in insertion.nodes:
        numbers[node] = _number(node, numbers)
        equal = is_call(node, aten.sub.Tensor) and not node.kwargs and _same(node, numbers)
        values.setdefault(node, Value.ZERO if equal else _transfer(node, values, insertion.before.meta["val"].dtype))
    return values[insertion.after] is Value.H


def _source(parameter: DeltaParameter) -> DeltaParameter:
    """The parameter that this one is a copy of at the start, or itself."""
    while (recipe := parameter.init.recipe) is not None and (copied := recipe.copied) is not None:
        if copied.dtype != parameter.dtype or copied.shape != parameter.shape:
            break
        parameter = copied
    return parameter


def _number(node: fx.Node, numbers: dict[fx.Node, Any]) -> Any:
    """A key that equal nodes share: the same op on the same operands; a random op equals itself alone."""
    if is_call(node, *_RANDOM):
        return node
    args, kwargs = (_key(part, numbers) for part in (node.args, node.kwargs))
    return node.target, args, kwargs


def _key(value: Any, numbers: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return numbers.get(value, value)
    if isinstance(value, (list, tuple)):
        return tuple(_key(item, numbers) for item in value)
    if isinstance(value, Mapping):
        return tuple(sorted((name, _key(item, numbers)) for name, item in value.items()))
    return type(value), value


def _same(node: fx.Node, numbers: dict[fx.Node, Any]) -> bool:
    return len(node.args) == 2 and _key(node.args[0], numbers) == _key(node.args[1], numbers)


def _transfer(node: fx.Node, values: dict[fx.Node, Value], dtype: torch.dtype) -> Value:
    """What is known of `node`; `dtype` is that of h."""

    def known(argument: Any) -> Value:
        if isinstance(argument, (list, tuple)):
            return Value.ZERO if any(known(item) is Value.ZERO for item in argument) else Value.OTHER
        if isinstance(argument, (int, float)):
            return Value.ZERO if argument == 0 else Value.OTHER
        return values.get(argument, Value.OTHER) if isinstance(argument, fx.Node) else Value.OTHER

    first = known(node.args[0]) if node.args else Value.OTHER
    if is_call(node, aten.to.dtype, aten.alias.default) and first is Value.H:
        holds = torch.promote_types(dtype, node.meta["val"].dtype) == node.meta["val"].dtype
        return Value.H if holds else Value.OTHER  # up and back again is the identity, down is a rounding
    if is_call(node, *_ODD, *_SHAPES):
        return Value.ZERO if first is Value.ZERO else Value.OTHER
    if is_call(node, *_PRODUCTS):
        return Value.ZERO if any(known(argument) is Value.ZERO for argument in node.args) else Value.OTHER
    if is_call(node, aten.linear.default):
        bias = node.args[2] if len(node.args) > 2 else None
        product = Value.ZERO in (first, known(operand(node, 1)))
        return Value.ZERO if product and (bias is None or known(bias) is Value.ZERO) else Value.OTHER
    if is_call(node, aten.div.Tensor):
        return first if first is Value.ZERO else Value.OTHER
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        second = known(node.args[1] if len(node.args) > 1 else None)
        if second is Value.ZERO:
            return first
        return second if first is Value.ZERO and is_call(node, aten.add.Tensor) else Value.OTHER
    return Value.OTHER
