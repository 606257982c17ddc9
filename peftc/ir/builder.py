"""`Builder`: writes new nodes into a graph, each with its fake value, at a moving point.

Every node it writes is checked the moment it is written: the op runs on the fake tensors of its operands, so a
wrong shape is an error at the expression that asked for it. Nodes carry the delta they belong to under
`meta["custom"]["peftc"]` and the module stack of the site, so that a hierarchical run keeps them in place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from peftc.ir.program import Program

aten = torch.ops.aten
Operand = Any
"""A node, a number, a list of those, a dtype, None."""


class Builder:
    """Writes nodes after `cursor`, which follows the last one written."""

    def __init__(self, program: Program, cursor: fx.Node, *, label: str, like: fx.Node | None = None) -> None:
        self.program = program
        self.cursor = cursor
        self.label = label
        self.nodes: list[fx.Node] = []
        self._stack = (like if like is not None else cursor).meta.get("nn_module_stack")
        self._mode = program.fake_mode

    @property
    def path(self) -> str:
        """The path of the module whose call the nodes belong to."""
        entries = list((self._stack or {}).values())
        return str(entries[-1][0]) if entries else ""

    def call(self, target: Any, *args: Operand, **kwargs: Operand) -> fx.Node:
        """Write `target(*args, **kwargs)`; raises what the op raises on operands it cannot take."""
        with _unlogged(), enable_python_dispatcher(), self._mode, torch.no_grad():
            value = target(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))
        with self.program.graph.inserting_after(self.cursor):
            node = self.program.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        node.meta["custom"] = {"peftc": self.label}
        if self._stack is not None:
            node.meta["nn_module_stack"] = self._stack
        self.cursor = node
        self.nodes.append(node)
        return node

    def size(self, node: fx.Node, axis: int) -> Operand:
        """The size of an axis: an int, or a node for a symbolic one."""
        size = node.meta["val"].shape[axis]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, axis % node.meta["val"].dim())

    def reshape(self, node: fx.Node, sizes: list[Operand]) -> fx.Node:
        return self.call(aten.reshape.default, node, sizes)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in `dtype`; the node itself when it has it already."""
        return node if node.meta["val"].dtype == dtype else self.call(aten.to.dtype, node, dtype)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """torch prints a traceback for operands that do not fit, before it raises; peftc tells it at the expression."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def latest(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    """The one of `nodes` that comes last in the graph."""
    wanted = set(nodes)
    found = None
    for node in graph.nodes:
        if node in wanted:
            found = node
    if found is None:
        raise ValueError("none of the nodes is in the graph")
    return found
