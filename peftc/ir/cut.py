"""Cutting a program at some of its values: what comes before them goes, and the values become inputs.

An encoder-decoder is traced as one graph and rewritten once. Cut at the encoder's last hidden state it is the decoder,
which takes that state from its caller; cut at the keys and values of cross attention as well it is one step of a
decoder that has computed them before. The other half, from the encoder's inputs to the hidden state, is the encoder.
Deltas lie where they were put, on either side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.ir.program import Binding, Program, is_call

aten = torch.ops.aten


def outputs(program: Program) -> Any:
    """The model's own output class, with the graph's nodes for tensors."""
    results: Any = program.output_node.args[0]
    spec: Any = program.exported.call_spec.out_spec
    return pytree.tree_map_only(int, lambda index: results[index], pytree.tree_unflatten(range(len(results)), spec))


def cut(
    program: Program,
    at: Mapping[str, fx.Node],
    results: Sequence[fx.Node] | None = None,
    inputs: Collection[str] = (),
) -> Program:
    """A program that takes the values of the nodes `at` as inputs of these names, and returns `results`.

    By default it returns what `program` does. Inputs that are no longer needed are gone, those named by `inputs` stay
    where anything reads them. The new program shares constants with the old one and has no sites. Raises nothing;
    `inputs` of the result tell what is still needed.
    """
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    copied: Any = graph.graph_copy(program.graph, mapping)
    returned = copied if results is None else tuple(mapping[node] for node in results)
    graph.output(returned)
    bindings = {mapping[node]: binding for node, binding in program.bindings.items()}
    last = list(bindings)[-1]
    for name, node in at.items():
        old = mapping[node]
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        last.meta["val"] = old.meta["val"]
        bindings[last] = Binding("input", name)
        old.replace_all_uses_with(last)
    _measure_elsewhere(graph, bindings, {*at, *inputs})
    _drop_unneeded(graph)
    for node, binding in list(bindings.items()):
        if binding.kind == "input" and not node.users:
            graph.erase_node(node)
            del bindings[node]
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Program(program.exported, module, bindings, program.constants, tied=program.tied)


def _measure_elsewhere(graph: fx.Graph, bindings: Mapping[fx.Node, Binding], staying: set[str]) -> None:
    """Read sizes from the inputs that stay where they have them: no other is kept for its size alone."""
    shapes = {node: node.meta["val"].shape for node, binding in bindings.items() if binding.name in staying}
    for node in list(graph.nodes):
        if not is_call(node, aten.sym_size.int) or node.args[0] in shapes:
            continue
        found = _same_size(node.meta["val"], shapes)
        if found is not None:
            with graph.inserting_before(node):
                other = graph.call_function(aten.sym_size.int, found)
            other.meta = dict(node.meta)
            node.replace_all_uses_with(other)


def _drop_unneeded(graph: fx.Graph) -> None:
    """Erase what the results do not need; an op in place is needed where the value that it changes is.

    `fx.Graph.eliminate_dead_code` keeps dropout, for it moves the state of a generator, and all that feeds it.
    """
    changing = [node for node in graph.nodes if _is_in_place(node)]
    needed, queue = set[fx.Node](), [graph.output_node()]
    while queue:
        while queue:
            node = queue.pop()
            if node not in needed:
                needed.add(node)
                queue.extend(node.all_input_nodes)
        queue = [node for node in changing if node not in needed and not needed.isdisjoint(_viewed(node))]
    for node in reversed(list(graph.nodes)):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)


def _is_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _viewed(node: fx.Node) -> Iterator[fx.Node]:
    """The value that an op in place changes, and what that is a view of."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
        if not _is_view(node):
            return


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None
    return shares or is_call(node, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default)


def _same_size(size: Any, shapes: Mapping[fx.Node, Any]) -> tuple[fx.Node, int] | None:
    """An axis of one of the nodes with the symbol of `size`."""
    if isinstance(size, int):
        return None
    for node, shape in shapes.items():
        for axis, other in enumerate(shape):
            if not isinstance(other, int) and other.node.expr == size.node.expr:
                return node, axis
    return None
