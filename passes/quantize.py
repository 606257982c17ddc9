"""quantize: let a graph read weights that are held in few bits.

A weight's placeholder gets the data in its place and a second placeholder for the scales; a linear layer on it becomes
`peftc.quantization.linear`, and whatever else reads it (a delta on the weight itself) reads it made whole, there and
then. Applied to the graph of an executor, after everything else: sites, plans and edits are those of the plain weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.ir.program import Binding, is_call, operand
from peftc.quantization import dequantize, linear

aten = torch.ops.aten

SCALE = "peftc_scale"
"""The buffer beside a quantized weight that holds its scales."""


@dataclass(frozen=True, slots=True)
class Quantize:
    """Read the parameters in `forms` (by name, to the form of each) quantized."""

    name: ClassVar[str] = "quantize"
    forms: Mapping[str, str]

    def apply_to(self, graph: fx.Graph, bindings: Mapping[fx.Node, Binding]) -> dict[fx.Node, Binding]:
        """Change the graph; what its placeholders stand for then, in order."""
        found: dict[fx.Node, Binding] = {}
        for node, binding in bindings.items():
            found[node] = binding
            form = self.forms.get(binding.name) if binding.kind == "parameter" else None
            if form is not None:
                with graph.inserting_after(node):
                    scale = graph.placeholder(f"{node.name}_scale")
                found[scale] = Binding("buffer", f"{binding.name.rpartition('.')[0]}.{SCALE}")
        scales = {binding.name: node for node, binding in found.items()}
        for node, binding in bindings.items():
            if binding.kind == "parameter" and binding.name in self.forms:
                scale = scales[f"{binding.name.rpartition('.')[0]}.{SCALE}"]
                _Reader(graph, node, scale, self.forms[binding.name]).rewrite()
        return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """Rewrites what reads one weight."""

    graph: fx.Graph
    weight: fx.Node
    scale: fx.Node
    form: str

    def rewrite(self) -> None:
        for user in list(self.weight.users):
            if is_call(user, aten.transpose.int, aten.t.default):
                for reader in list(user.users):
                    self._linear(reader, user, "in")
                if not user.users:
                    self.graph.erase_node(user)
            else:
                self._linear(user, self.weight, "out")
        rest = [user for user in self.weight.users if user.target is not linear]
        if rest:
            self._whole(rest)

    def _linear(self, node: fx.Node, weight: fx.Node, stored: str) -> None:
        if not is_call(node, aten.linear.default) or operand(node, 1) is not weight or operand(node, 0) is weight:
            return
        bias = node.args[2] if len(node.args) > 2 else None
        with self.graph.inserting_before(node):
            new = self.graph.call_function(linear, (operand(node, 0), self.weight, self.scale, bias, self.form, stored))
        new.meta = node.meta
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _whole(self, readers: list[fx.Node]) -> None:
        """Each reader has the weight made whole for itself, so that none is held between them."""
        for reader in readers:
            with self.graph.inserting_before(reader):
                dtype = self.weight.meta["val"].dtype
                whole = self.graph.call_function(dequantize, (self.weight, self.scale, self.form, dtype))
            whole.meta = {**self.weight.meta, "nn_module_stack": reader.meta.get("nn_module_stack")}
            reader.replace_input_with(self.weight, whole)
