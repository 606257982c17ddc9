"""What the converter of torch gets wrong or has no word for, written otherwise in the graph that is exported. Every
change computes the same; a graph without such places stays as it is.

    repair(program.graph)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def repair(graph: fx.Graph) -> None:
    """Rewrite those nodes in place."""
    for node in list(graph.nodes):
        change = _CHANGES.get(node.target) if node.op == "call_function" else None
        if change is not None:
            with graph.inserting_before(node):
                new = change(graph, node)
            if new is not None:
                node.replace_all_uses_with(new)
                graph.erase_node(node)


def _promoted(graph: fx.Graph, node: fx.Node) -> None:
    """Whole numbers beside a Python float: the decomposition of torch 2.13 mixes up their promotion."""
    whole, number = node.args[:2]
    if not isinstance(whole, fx.Node) or not isinstance(number, float):
        return
    operand, result = whole.meta["val"], node.meta["val"]
    if isinstance(operand, torch.Tensor) and not operand.is_floating_point() and result.is_floating_point():
        node.update_arg(0, _call(graph, node, aten.to.dtype, whole, result.dtype))


def _counted(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """How often each of one kind occurs: a mixture of one expert, which all rows belong to."""
    if len(node.args) < 2 or node.args[1] != 1 or node.args[2:]:
        return None
    ones = _call(graph, node, aten.ones_like.default, node.args[0])
    return _call(graph, node, aten.sum.dim_IntList, ones, [0], True)


def _kept(_: fx.Graph, node: fx.Node) -> Any:
    """The squeeze of an axis that is longer than one is no squeeze; the converter writes one all the same."""
    value: Any = node.args[0]
    return value if value.meta["val"].dim() == node.meta["val"].dim() else None


def _widened(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A new axis of complex numbers: their two parts stand on the last one."""
    if not node.meta["val"].is_complex():
        return None
    value, axis = node.args
    pairs = _call(graph, node, aten.view_as_real.default, value)
    pairs.meta["val"] = aten.view_as_real.default(value.meta["val"])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    wide = _call(graph, node, aten.unsqueeze.default, pairs, axis if axis >= 0 else axis - 1)  # pyright: ignore[reportOperatorIssue]
    wide.meta["val"] = aten.view_as_real.default(node.meta["val"])
    return _call(graph, node, aten.view_as_complex.default, wide)


def _call(graph: fx.Graph, like: fx.Node, op: Any, *arguments: Any) -> fx.Node:
    """A call with what is known of `like`; whoever gives it another value sets `val` anew."""
    new = graph.call_function(op, arguments)
    new.meta.update(like.meta)
    return new


_CHANGES: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node | None]] = {
    aten.rsub.Scalar: _promoted,
    aten.sub.Scalar: _promoted,
    aten.sub.Tensor: _promoted,
    aten.mul.Scalar: _promoted,
    aten.mul.Tensor: _promoted,
    aten.histc.default: _counted,
    aten.squeeze.dim: _kept,
    aten.unsqueeze.default: _widened,
}
