"""Constant parts: what a remaining delta computes from parameters alone is computed once, and stored.

A prefix that is made by an MLP becomes its keys and values; the MLP's parameters are then read by nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.fold.affine import Constant, Kind, classify
from peftc.fold.evaluate import Read, evaluate
from peftc.ir.initial import Init
from peftc.ir.program import DeltaParameter, Insertion, Program, is_call, operand

aten = torch.ops.aten

_TRIVIAL = (
    aten.transpose.int, aten.unsqueeze.default, aten.to.dtype, aten.expand.default, aten.slice.Tensor,
    aten.alias.default,
)  # fmt: skip
"""Ops that are no work: a parameter seen through these alone stays the parameter."""


def evaluate_constants(program: Program, insertions: list[Insertion], read: Read) -> dict[str, torch.Tensor]:
    """Replace constant subgraphs of the insertions by stored parameters; returns the new ones' values by name.

    Raises `PeftcError` E042 when one holds NaN or infinity.
    """
    values: dict[str, torch.Tensor] = {}

    def known(name: str) -> torch.Tensor:
        return values[name] if name in values else read(name)  # a constant may be made of one that is stored by now

    for insertion in insertions:
        parameters = program.placeholders("parameter")
        owner = insertion.parameters[-1].rpartition(".")[0] if insertion.parameters else insertion.delta
        for node in _results(insertion, set(parameters.values())):
            tensor = evaluate(program, node, {}, known).contiguous()
            if not torch.isfinite(tensor).all():
                fail("E042", f"{node} of delta `{insertion.delta}` holds NaN or infinity", help="check the delta")
            name = _new_name(f"{owner}.{insertion.site.kind}_constant", {*parameters, *values})
            parameter = DeltaParameter(name, tuple(tensor.shape), tensor.dtype, Init("zeros"), True, insertion.delta)
            node.replace_all_uses_with(program.add_parameter(parameter))
            values[name] = tensor
    program.graph.eliminate_dead_code()
    return values


def _results(insertion: Insertion, parameters: set[fx.Node]) -> list[fx.Node]:
    """The constant nodes that something else than a constant reads, where they are more than a parameter."""
    kinds = classify(insertion.nodes, {}, parameters)
    constant = [node for node in insertion.nodes if isinstance(kinds[node], Constant) and _is_read(node, kinds)]
    return [node for node in constant if not _is_parameter(node, parameters)]


def _is_read(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    return any(not isinstance(kinds.get(user), Constant) for user in node.users)


def _is_parameter(node: fx.Node, parameters: set[fx.Node]) -> bool:
    return unwrapped(node) in parameters


def unwrapped(node: fx.Node) -> fx.Node:
    """The node behind ops that are no work."""
    while is_call(node, *_TRIVIAL):
        node = operand(node, 0)
    return node


def _new_name(stem: str, taken: set[str]) -> str:
    return next(name for i in range(len(taken) + 1) if (name := f"{stem}_{i}") not in taken)
