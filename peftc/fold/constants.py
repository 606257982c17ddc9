"""Constant parts: what a remaining delta computes from parameters alone is computed once, and stored.

A prefix that is made by an MLP becomes its keys and values; the MLP's parameters are then read by nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from peftc.fold.affine import Constant, classify
from peftc.fold.evaluate import Read, evaluate
from peftc.ir.program import DeltaParameter, Init, Insertion, Program, is_call

aten = torch.ops.aten

_TRIVIAL = (aten.transpose.int, aten.unsqueeze.default, aten.to.dtype, aten.expand.default, aten.slice.Tensor)
"""Ops that are no work: a parameter seen through these alone stays the parameter."""


def evaluate_constants(program: Program, insertions: list[Insertion], read: Read) -> dict[str, torch.Tensor]:
    """Replace constant subgraphs of the insertions by stored parameters; returns the new ones' values by name."""
    values: dict[str, torch.Tensor] = {}
    for insertion in insertions:
        parameters = set(program.placeholders("parameter").values())
        kinds = classify(insertion.nodes, {}, parameters)
        frontier = [n for n in insertion.nodes if isinstance(kinds[n], Constant) and _leaves(n, kinds)]
        for index, node in enumerate(node for node in frontier if _is_work(node, parameters)):
            owner = insertion.parameters[0].rpartition(".")[0]
            tensor = evaluate(program, node, {}, read)
            name = f"{owner}.constant_{index}"
            parameter = DeltaParameter(name, tuple(tensor.shape), tensor.dtype, Init("zeros"), True, insertion.delta)
            node.replace_all_uses_with(program.add_parameter(parameter))
            values[name] = tensor
    program.graph.eliminate_dead_code()
    return values


def _leaves(node: fx.Node, kinds: dict[fx.Node, object]) -> bool:
    return any(not isinstance(kinds.get(user), Constant) for user in node.users)


def _is_work(node: fx.Node, parameters: set[fx.Node]) -> bool:
    while is_call(node, *_TRIVIAL):
        node = node.args[0]  # type: ignore[assignment]
    return node not in parameters
