"""A graph in parts: the slices of it that belong to calls of modules, so that calling those modules runs the graph.

A flat graph calls no module of the model, so what acts on calls of modules does not act: the all-gather of FSDP2,
activation checkpointing, forward hooks. `slices` cuts the list of nodes where the calls of chosen modules (units) begin
and end, by the module stack that the trace left at every node; a unit inside a unit gives slices inside a slice.

    before | encoder.layer.0 | encoder.layer.1 | ... | after

Invariant: the slices in order are the nodes of the flat graph in order, none twice; only what deltas compute of
parameters ahead of everything (a new weight) moves to where it is used first, which changes no value. So values,
gradients and random numbers are those of the flat graph, whatever a value skips or is shared by, and nothing can be cut
wrongly; what may fail is that the nodes of a call are no run of the list, and that is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from peftc.diagnostics import fail


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive nodes: those of one call of `unit`, or ("") those between two such calls."""

    unit: str
    nodes: tuple[fx.Node, ...]
    parts: tuple[Slice, ...] = ()
    """The nodes again, cut by the units inside this one; empty when there are none."""


@dataclass(frozen=True, slots=True)
class _Call:
    unit: str
    key: str
    """The trace's own name of the call: a module that is called twice has two."""


Chains = Mapping[fx.Node, Sequence[_Call]]


def slices(nodes: Sequence[fx.Node], units: Mapping[str, str], inserted: Collection[fx.Node]) -> tuple[Slice, ...]:
    """Cut `nodes`, in graph order, by calls of `units`: paths of modules (all names of each) to the units' own paths.

    `inserted` are the nodes of deltas: they stand with the site they change, and where one has to stand elsewhere (it
    reads what a later block computes) it is run there. Raises `PeftcError` E041 when a call is no run of the list.
    """
    chains = {node: _chain(node, units) for node in nodes}
    new = frozenset(inserted)
    return _cut(_sunk(nodes, chains, new), chains, 0, new)


def _sunk(nodes: Sequence[fx.Node], chains: Chains, inserted: frozenset[fx.Node]) -> list[fx.Node]:
    """The nodes with those of deltas that stand ahead of their call moved to where they are used first.

    A node that draws random numbers or writes stays where it is.
    """
    own = [chains[node][0] if chains[node] and node not in inserted else None for node in nodes]
    first = {call: span[0] for call, span in _spans(own).items()}
    place = {node: index for index, node in enumerate(nodes)}
    anchor = dict(place)
    for node in reversed(nodes):
        ahead = node in inserted and chains[node] and place[node] < first.get(chains[node][0], 0)
        users = [anchor[user] for user in node.users if user in anchor]
        if ahead and users and _is_pure(node):
            anchor[node] = min(users)
    return sorted(nodes, key=lambda node: (anchor[node], anchor[node] == place[node], place[node]))


def _is_pure(node: fx.Node) -> bool:
    tags, schema = getattr(node.target, "tags", ()), getattr(node.target, "_schema", None)
    return torch.Tag.nondeterministic_seeded not in tags and not (schema is not None and schema.is_mutable)


def called(graph: fx.Graph) -> dict[str, None]:
    """Paths of the modules whose calls made the nodes of a graph, in the order of their calls."""
    return {path: None for node in graph.nodes for path, _ in _stack(node)}


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """Path and the trace's own name of each call that a node was made in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(entry[0]).partition("@")[0], key) for key, entry in stack.items()]


def _chain(node: fx.Node, units: Mapping[str, str]) -> tuple[_Call, ...]:
    """The calls of units that a node was made in, outermost first."""
    return tuple(_Call(units[path], key) for path, key in _stack(node) if path in units)


def _cut(nodes: Sequence[fx.Node], chains: Chains, depth: int, inserted: frozenset[fx.Node]) -> tuple[Slice, ...]:
    calls = [chains[node][depth] if len(chains[node]) > depth else None for node in nodes]
    own = [None if node in inserted else call for node, call in zip(nodes, calls, strict=True)]
    spans = _spans(own)
    _refuse_crossing(spans, nodes)
    found: list[Slice] = []
    position = 0
    for call, (first, last) in spans.items():
        while first > position and nodes[first - 1] in inserted and calls[first - 1] == call:
            first -= 1
        ahead = last
        while ahead + 1 < len(nodes) and nodes[ahead + 1] in inserted:
            ahead += 1
            last = ahead if calls[ahead] == call else last
        if first > position:
            found.append(Slice("", tuple(nodes[position:first])))
        inside = tuple(nodes[first : last + 1])
        parts = _cut(inside, chains, depth + 1, inserted)
        found.append(Slice(call.unit, inside, parts if any(part.unit for part in parts) else ()))
        position = last + 1
    if position < len(nodes):
        found.append(Slice("", tuple(nodes[position:])))
    return tuple(found)


def _spans(calls: Sequence[_Call | None]) -> dict[_Call, tuple[int, int]]:
    """The first and the last place of each call, in the order of the first."""
    spans: dict[_Call, tuple[int, int]] = {}
    for place, call in enumerate(calls):
        if call is not None:
            spans[call] = (spans.get(call, (place, place))[0], place)
    return spans


def _refuse_crossing(spans: Mapping[_Call, tuple[int, int]], nodes: Sequence[fx.Node]) -> None:
    previous: tuple[_Call, int] | None = None
    for call, (first, last) in spans.items():
        if previous is not None and first <= previous[1]:
            fail(
                "E041",
                f"the graph cannot be run module by module: `{call.unit}` begins (at {nodes[first].name}) before "
                f"`{previous[0].unit}` ends",
                help=f"take hooks, sharding and checkpointing off `{call.unit}`",
            )
        previous = call, last
