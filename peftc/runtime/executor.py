"""Executors: a program's graph as a callable on real tensors.

The graph's placeholders are filled: parameters and buffers by name from a module, constants from the program, then
the caller's inputs. The result is put back into the model's own output class.

With `units`, paths of modules, the graph runs in parts (`peftc.runtime.hierarchy`), and the part of a unit runs when
that module is called: hooks, sharding and checkpointing of the module act, and its parameters are read inside the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.ir.program import Binding, Program
from peftc.passes.quantize import Quantize
from peftc.passes.set_mode import SetMode
from peftc.quantization import dequantize
from peftc.runtime.dropouts import set_rates
from peftc.runtime.hierarchy import slices
from peftc.runtime.parts import Modules, Parts, State, compiled


class Executor:
    """A graph compiled for one mode and one device.

    `units` maps every path of each module that is to be called to the one it is asked for by, `quantized` each
    parameter that is held in few bits to its form, `rates` a node that drops to its rate, where that is not the
    trace's. Raises `PeftcError` E041 when the graph cannot be cut at the calls of units.
    """

    def __init__(
        self,
        program: Program,
        *,
        training: bool,
        device: torch.device,
        units: Mapping[str, str] | None = None,
        quantized: Mapping[str, str] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        build: Any = self._build  # the decorator hides the signature
        build(program, training, device, units or {}, quantized or {}, rates or {})

    @torch.compiler.disable
    def _build(
        self,
        program: Program,
        training: Any,
        device: torch.device,
        units: Mapping[str, str],
        quantized: Mapping[str, str],
        rates: Mapping[str, float],
    ) -> None:
        graph = fx.Graph()
        result = graph.graph_copy(program.graph, mapping := {})
        graph.output(result)
        set_rates({old.name: new for old, new in mapping.items()}, rates)
        self._constants = {name: value.to(device) for name, value in program.constants.items() if not value.is_meta}
        self._out_spec: Any = program.exported.call_spec.out_spec
        self.nodes = mapping
        SetMode(training=training).apply_to(graph)
        bindings = Quantize(quantized).apply_to(graph, {mapping[node]: b for node, b in program.bindings.items()})
        self._bindings = [(b.kind, b.name) for b in bindings.values()]
        move_to(graph, device)
        self.module = fx.GraphModule(torch.nn.Module(), graph)
        self._results: tuple[Any, ...] = tuple(graph.output_node().args[0])  # pyright: ignore[reportArgumentType]
        self.parts = self._cut(program, graph, bindings, units) if units else None

    def _cut(
        self, program: Program, graph: fx.Graph, bindings: Mapping[fx.Node, Binding], units: Mapping[str, str]
    ) -> Parts:
        inserted = {self.nodes[node] for node in program.inserted if node in self.nodes}
        inserted |= {node for node in graph.nodes if node.target is dequantize and inserted.issuperset(node.users)}
        computed = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        takes = [node for node, binding in bindings.items() if binding.kind in ("constant", "input")]
        gives = dict.fromkeys(result for result in self._results if isinstance(result, fx.Node))
        return compiled(slices(computed, units, inserted), takes, [*gives], bindings)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for kind, name in self._bindings if kind == "input")

    def flat(self, state: State, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
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

    def in_parts(self, state: State, inputs: Mapping[str, torch.Tensor], modules: Modules) -> tuple[Any, ...]:
        """As `flat`, each unit's part run by calling the module that `modules` gives for its path."""
        run: Any = self._by_parts
        return self.flat(state, inputs) if self.parts is None else run(self.parts, state, inputs, modules)

    @torch.compiler.disable
    def _by_parts(
        self, parts: Parts, state: State, inputs: Mapping[str, torch.Tensor], modules: Modules
    ) -> tuple[Any, ...]:
        """Not compiled: torch.compile would have to follow hooks and checkpoints of every module."""
        values = [
            inputs[name] if kind == "input" else self._constants.get(name)
            for kind, name in self._bindings
            if kind in ("constant", "input")
        ]
        found = dict(zip(parts.gives, parts(state, values, modules), strict=True))
        return tuple(found[result.name] if isinstance(result, fx.Node) else result for result in self._results)

    def __call__(self, state: State, inputs: Mapping[str, torch.Tensor], modules: Modules) -> Any:
        """Run and return the model's own output class."""
        return pytree.tree_unflatten(list(self.in_parts(state, inputs, modules)), self._out_spec)


def move_to(graph: fx.Graph, device: torch.device) -> None:
    """Point every op that makes a tensor at `device`."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = pytree.tree_map_only(torch.device, moved, node.args)
            node.kwargs = pytree.tree_map_only(torch.device, moved, node.kwargs)
