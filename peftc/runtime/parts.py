"""`Parts`: the slices of a graph compiled, each one run when its module is called.

A part takes values of earlier parts and gives those that later ones read; parameters and buffers it reads by name when
it runs, so inside the call of its module. The first value that a part takes is the first that its nodes read, and the
first that it gives is the last computed: for a transformer block both are the hidden state, so a hook sees the
arguments and the result in that order. A part that gives one value gives it bare, as modules do.

Nothing here holds a module or a weight.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.diagnostics import fail
from peftc.ir.program import Binding, is_getitem, operand
from peftc.runtime.hierarchy import Slice
from peftc.runtime.units import call_unit, computes_again

State = Mapping[str, torch.Tensor]
Modules = Callable[[str], torch.nn.Module]
Bindings = Mapping[fx.Node, Binding]


@dataclass(frozen=True, slots=True)
class Code:
    """Nodes without units among them: one compiled graph."""

    module: fx.GraphModule
    reads: tuple[str, ...]
    """Parameters and buffers, by their names in the state dict."""
    unit: str

    def __call__(self, state: State, values: Sequence[Any], modules: Modules) -> Sequence[Any]:
        return self.module(*[self._whole(name, state[name]) for name in self.reads], *values)

    def _whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor; a shard, which FSDP2 leaves outside the call of the parameter's module, is refused."""
        sharded = sys.modules.get("torch.distributed.tensor")
        if sharded is not None and isinstance(tensor, sharded.DTensor):
            where = f"in the call of `{self.unit}`" if self.unit else "outside the call of its module"
            fail(
                "E041",
                f"{name} is sharded where the graph reads it, {where}",
                help="shard a module that is being called there, or leave the module of this parameter whole",
            )
        return tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One part: what it takes and gives, by names of nodes, and which of the values nothing reads after it."""

    unit: str
    body: Code | Parts
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    last: tuple[str, ...]
    overwrites: str = ""
    """A node that writes into a value taken from elsewhere: such a part cannot be computed a second time."""

    def run(self, state: State, modules: Modules, *values: Any) -> Any:
        found = self.body(state, values, modules)
        return found[0] if len(self.gives) == 1 else tuple(found)


@dataclass(frozen=True, slots=True)
class Parts:
    """Steps in order, as a function from the values `takes` to the values `gives`, by names of nodes."""

    steps: tuple[Step, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    def __call__(self, state: State, values: Sequence[Any], modules: Modules) -> Sequence[Any]:
        known = dict(zip(self.takes, values, strict=True))
        for step in self.steps:
            arguments = [known[name] for name in step.takes]
            for name in step.last:
                del known[name]
            run = functools.partial(step.run, state, modules)
            found = self._call(step, modules(step.unit), run, arguments) if step.unit else run(*arguments)
            del arguments
            known.update(zip(step.gives, (found,) if len(step.gives) == 1 else found, strict=True))
        return [known[name] for name in self.gives]

    @staticmethod
    def _call(step: Step, module: torch.nn.Module, run: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        if step.overwrites and computes_again(module):
            what = f"`{step.unit}` writes into a buffer or an input of its own (at {step.overwrites})"
            message = f"{what}, so it cannot be computed again"
            fail("E041", message, help="turn activation checkpointing off")
        return call_unit(module, run, arguments)


def compiled(cut: Sequence[Slice], takes: Sequence[fx.Node], gives: Sequence[fx.Node], bindings: Bindings) -> Parts:
    """Compile each slice. A value is let go after the last slice that reads it, unless it is given."""
    taken = [_taken(part.nodes, bindings) for part in cut]
    last = {node: index for index, operands in enumerate(taken) for node in operands}
    steps = []
    for index, part in enumerate(cut):
        done = [node for node in taken[index] if last[node] == index and node not in gives]
        given = _given(part.nodes, gives)
        if part.parts:
            body: Code | Parts = compiled(part.parts, taken[index], given, bindings)
        else:
            body = _code(part, taken[index], given, bindings)
        writer = _overwriting(part.nodes)
        steps.append(Step(part.unit, body, _names(taken[index]), _names(given), _names(done), writer))
    return Parts(tuple(steps), _names(takes), _names(gives))


def _names(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _of_state(node: fx.Node, bindings: Bindings) -> bool:
    return node in bindings and bindings[node].kind in ("parameter", "buffer")


def _taken(nodes: Sequence[fx.Node], bindings: Bindings) -> list[fx.Node]:
    """What `nodes` read of others' values, in the order of reading."""
    own = set(nodes)
    read = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in own)
    return [node for node in read if not _of_state(node, bindings)]


def _given(nodes: Sequence[fx.Node], results: Collection[fx.Node]) -> list[fx.Node]:
    """What others read of the values of `nodes`, the last computed first."""
    own = set(nodes)
    return [
        node
        for node in reversed(nodes)
        if node in results or any(user not in own and user.op != "output" for user in node.users)
    ]


def _overwriting(nodes: Sequence[fx.Node]) -> str:
    """The name of a node that writes into a value that is not of `nodes`, or into a view of one; "" when none does."""
    own = {node for node in nodes if node.op == "call_function"}

    def source(node: Any) -> Any:
        while node in own and (argument := _aliased(node, writes=False)) is not None:
            node = argument
        return node

    for node in nodes:
        written = _aliased(node, writes=True)
        if written is not None and source(written) not in own:
            return node.name
    return ""


def _aliased(node: fx.Node, *, writes: bool) -> fx.Node | None:
    """The first argument that the op writes into (`writes`), or that its result may be a view of."""
    if is_getitem(node):
        return None if writes else operand(node, 0)
    schema = getattr(node.target, "_schema", None)
    for argument, given in zip(schema.arguments if schema is not None else (), node.args, strict=False):
        alias = argument.alias_info
        if isinstance(given, fx.Node) and alias is not None and (alias.is_write or not writes):
            return given
    return None


def _code(part: Slice, taken: Sequence[fx.Node], given: Sequence[fx.Node], bindings: Bindings) -> Code:
    operands = dict.fromkeys(operand for node in part.nodes for operand in node.all_input_nodes)
    reads = [node for node in operands if _of_state(node, bindings)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in (*reads, *taken)}
    for node in part.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in given))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Code(module, tuple(bindings[node].name for node in reads), part.unit)
