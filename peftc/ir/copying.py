"""Copies of a program: one trace serves many rewrites, each on nodes of its own.

copied(program).graph   # other nodes, the same names, shapes and fake mode; the ExportedProgram is shared
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

from peftc.ir.program import Program


def copied(program: Program) -> Program:
    """A program that may be changed without changing `program`: its sites and ledger point into the copied graph.

    Tensors (constants, fake values of nodes) and the `ExportedProgram` are shared; no pass changes them in place.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    output = program.graph.output_node()
    mapping[output] = graph.output_node()
    graph.output_node().meta = copy.copy(output.meta)
    module = fx.GraphModule(program.graph_module, graph)
    shared: tuple[Any, ...] = (program.exported, *program.constants.values())
    memo: dict[int, Any] = {id(item): item for item in shared}
    memo |= {id(old): new for old, new in mapping.items()}
    memo |= {id(program.graph_module): module, id(program.graph): graph}
    memo |= {id(node.meta["val"]): node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    memo |= {id(p.dtype): p.dtype for p in program.delta_parameters.values()}
    fields = {name: copy.deepcopy(getattr(program, name), memo) for name in _FIELDS}
    return Program(program.exported, module, guards=program.guards, **fields)


_FIELDS = (
    "bindings", "constants", "sites", "ledger", "delta_parameters", "trainable", "tied", "replaced", "replaced_at",
    "carried", "fixed",
)  # fmt: skip
