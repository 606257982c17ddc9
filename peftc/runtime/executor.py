"""Executors: a program's graph as a callable on real tensors.

The graph's placeholders are filled in order: parameters and buffers by name from a module, constants from the
program, then the caller's inputs. The result is put back into the model's own output class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.ir.program import Program
from peftc.passes.set_mode import SetMode


class Executor:
    """A graph compiled for one mode and one device."""

    def __init__(self, program: Program, *, training: bool, device: torch.device) -> None:
        graph = fx.Graph()
        result = graph.graph_copy(program.graph, mapping := {})
        graph.output(result)
        self._bindings = [(b.kind, b.name) for b in program.bindings.values()]
        self._constants = {name: value.to(device) for name, value in program.constants.items() if not value.is_meta}
        self._out_spec: Any = program.exported.call_spec.out_spec
        self.nodes = mapping
        SetMode(training=training).apply_to(graph)
        move_to(graph, device)
        self.module = fx.GraphModule(torch.nn.Module(), graph)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for kind, name in self._bindings if kind == "input")

    def flat(self, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Run on `state` (parameters and buffers by name) and `inputs`; the graph's outputs as a tuple."""
        arguments = []
        for kind, name in self._bindings:
            if kind == "input":
                arguments.append(inputs[name])
            elif kind == "constant":
                arguments.append(self._constants.get(name))
            else:
                arguments.append(state[name])
        return self.module(*arguments)

    def __call__(self, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> Any:
        """Run and return the model's own output class."""
        return pytree.tree_unflatten(list(self.flat(state, inputs)), self._out_spec)


def move_to(graph: fx.Graph, device: torch.device) -> None:
    """Point every op that makes a tensor at `device`."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = pytree.tree_map_only(torch.device, moved, node.args)
            node.kwargs = pytree.tree_map_only(torch.device, moved, node.kwargs)
