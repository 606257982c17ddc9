"""verify: check that a program still holds together; runs between passes.

- the graph is well formed, placeholders come first and each has a binding, in order;
- no placeholder of the base has gone (base parameters are untouched: the graph has no op that writes to one);
- every trainable delta parameter is reached by a gradient, that is: feeds the output through differentiable ops.

A failure here is a bug in a pass, named with the pass, except for a parameter that gets no gradient: that is the
rule's doing and is reported at the delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.ir.program import Program, is_call
from peftc.locate.walk import PIECES, VIEWS

_NO_GRADIENT = frozenset({
    "sign", "le", "lt", "ge", "gt", "eq", "ne", "argmax", "argmin", "floor", "round", "detach", "ones_like",
    "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "full", "sym_size",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verify:
    """Check the program after the pass named `after`."""

    name: ClassVar[str] = "verify"
    after: str = ""

    def apply(self, program: Program) -> None:
        program.graph.lint()
        self._check_placeholders(program)
        self._check_writes(program)
        self._check_gradients(program)

    def _check_placeholders(self, program: Program) -> None:
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        if nodes != list(program.bindings):
            raise AssertionError(f"after pass `{self.after}`: placeholders and bindings differ")
        for name in program.exported.graph_signature.parameters:
            if name not in program.placeholders("parameter"):
                raise AssertionError(f"after pass `{self.after}`: base parameter {name} is gone")

    def _check_writes(self, program: Program) -> None:
        for name, node in program.placeholders("parameter").items():
            for user in node.users:
                schema = getattr(user.target, "_schema", None)
                if schema is not None and schema.is_mutable and user.args and user.args[0] is node:
                    raise AssertionError(f"after pass `{self.after}`: {user} writes to parameter {name}")

    def _check_gradients(self, program: Program) -> None:
        if not program.trainable:
            return
        reached = _reached_by_gradient(program)
        for name, node in program.placeholders("parameter").items():
            parameter = program.delta_parameters.get(name)
            if parameter is not None and name in program.trainable and node not in reached:
                fail(
                    "E024",
                    f"delta `{parameter.delta}`: no gradient reaches its parameter {name}",
                    help="use it in the form or in `compose`, mark it `frozen: true`, or take it out",
                )


def _reached_by_gradient(program: Program) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    queue, written = list(program.output_node.all_input_nodes), _written(program)
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        queue.extend(written.get(node, ()))
        if _differentiable(node):
            reached.add(node)
            queue.extend(node.all_input_nodes)
    return reached


def _written(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """What is written in place, by the values that hold it: a scan fills zeros with the results of its tokens."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args:
            continue
        holder = node.args[0]
        while isinstance(holder, fx.Node):
            found.setdefault(holder, []).append(node)
            holder = holder.args[0] if is_call(holder, *VIEWS, *PIECES) else None
    return found


def _differentiable(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None and packet.__name__ in _NO_GRADIENT:
        return False
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
