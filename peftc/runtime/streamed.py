"""A program run with its weights on disk: each is read when its turn comes and dropped after its last use.

Several batches go through the graph together, so every weight is read once. Linear layers and embeddings take their
weight in blocks of rows, so that a vocabulary's matrix never stands in memory whole.

    run = StreamedRun(program, stored, torch.float32)
    outputs = run([batch, other_batch])      # a list of outputs for each batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.ir.program import Program, is_call, operand
from peftc.passes.set_mode import SetMode
from peftc.runtime.executor import move_to

aten = torch.ops.aten
_BLOCK = 1 << 22
"""Elements of a block of rows: 16 MiB in float32."""


class StoredTensors(Protocol):
    """Where weights are: whole, and, where they are stored as they are, by rows."""

    def __call__(self, name: str) -> torch.Tensor: ...
    def rows(self, name: str, first: int, last: int) -> torch.Tensor: ...


class StreamedRun:
    """The program in evaluation mode, computed in `dtype` on the CPU; it should have been traced in that dtype."""

    def __init__(self, program: Program, stored: StoredTensors, dtype: torch.dtype) -> None:
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.graph, mapping := {}))
        SetMode(training=False).apply_to(graph)
        move_to(graph, torch.device("cpu"))
        self._bindings = {mapping[node]: binding for node, binding in program.bindings.items()}
        self._constants, self._stored, self._dtype = program.constants, stored, dtype
        self._nodes = list(graph.nodes)
        self._last = {read: node for node in self._nodes for read in node.all_input_nodes}

    def __call__(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[list[torch.Tensor]]:
        """The tensors that the graph returns, for each batch."""
        values: dict[fx.Node, list[Any]] = {}
        with torch.no_grad():
            for node in self._nodes:
                if node.op == "output":
                    found = [_filled(node.args[0], values, i) for i in range(len(batches))]
                    return [[v for v in pytree.tree_leaves(f) if isinstance(v, torch.Tensor)] for f in found]
                if node.op == "placeholder":
                    binding = self._bindings[node]
                    if binding.kind == "input":
                        values[node] = [batch[binding.name] for batch in batches]
                    continue
                values[node] = self._compute(node, values, len(batches))
                for read in node.all_input_nodes:
                    if self._last[read] is node:
                        values.pop(read, None)
        raise AssertionError("a graph without an output")

    def _compute(self, node: fx.Node, values: dict[fx.Node, list[Any]], count: int) -> list[Any]:
        by_rows = {"linear": self._linear, "embedding": self._embedding}
        for name, weight_at in (("linear", 1), ("embedding", 0)):
            if is_call(node, getattr(aten, name).default) and self._is_large(node.args[weight_at], values):
                return by_rows[name](node, values, count)
        for read in node.all_input_nodes:
            if read not in values:
                values[read] = [self._parameter(read)] * count
        target: Any = node.target
        filled = [_filled((node.args, node.kwargs), values, i) for i in range(count)]
        return [target(*args, **kwargs) for args, kwargs in filled]

    def _is_large(self, weight: Any, values: Mapping[fx.Node, Any]) -> bool:
        """Whether it is a parameter that has not been read."""
        return isinstance(weight, fx.Node) and weight not in values and self._bindings[weight].kind == "parameter"

    def _parameter(self, node: fx.Node) -> torch.Tensor | None:
        binding = self._bindings[node]
        if binding.kind == "constant":
            return self._constants.get(binding.name)
        return self._cast(self._stored(binding.name))

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _linear(self, node: fx.Node, values: dict[fx.Node, list[Any]], count: int) -> list[Any]:
        weight, bias = operand(node, 1), (*node.args, None)[2]
        name, (rows, width) = self._bindings[weight].name, weight.meta["val"].shape
        xs = [_filled(node.args[0], values, i) for i in range(count)]
        step = max(1, _BLOCK // int(width))
        results = [x.new_empty(*x.shape[:-1], int(rows)) for x in xs]
        for first in range(0, int(rows), step):
            last = min(first + step, int(rows))
            block = self._cast(self._stored.rows(name, first, last))
            for x, result in zip(xs, results, strict=True):
                result[..., first:last] = torch.nn.functional.linear(x, block)
            del block  # before the next one is read
        if not isinstance(bias, fx.Node):
            return results
        offset: list[Any] = values[bias] if bias in values else [self._parameter(bias)] * count
        return [result.add_(own) for result, own in zip(results, offset, strict=True)]

    def _embedding(self, node: fx.Node, values: dict[fx.Node, list[Any]], count: int) -> list[Any]:
        weight = operand(node, 0)
        name, results = self._bindings[weight].name, []
        for i in range(count):
            ids = _filled(node.args[1], values, i)
            used, places = ids.unique(return_inverse=True)
            rows = [self._stored.rows(name, row, row + 1) for row in used.tolist()]
            results.append(self._cast(torch.cat(rows))[places])
        return results


def _filled(argument: Any, values: Mapping[fx.Node, list[Any]], index: int) -> Any:
    return fx.map_arg(argument, lambda node: values[node][index])
