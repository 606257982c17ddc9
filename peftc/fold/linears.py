"""What a fold can reach: the linear layer that makes a value or takes it, and the deltas met on the way.

The site table knows every linear layer as it stood before any delta; the ledger knows what was written since. A walk
from a tap crosses views, pieces of fused projections, and the places where other deltas wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from peftc.fold.evaluate import selection
from peftc.ir.program import Insertion, Program, is_call, is_getitem, module_path, operand
from peftc.ir.sites import Linear
from peftc.locate.walk import DROPOUT, PIECES, VIEWS

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Path:
    """A linear layer, and the ledger entries between it and a tap."""

    linear: Linear
    met: tuple[Insertion, ...]


def readers_of(linear: Linear) -> set[fx.Node]:
    """The nodes by which a linear layer reads its weight and its bias."""
    found, node = {linear.node}, linear.weight_operand
    while node is not linear.weight:
        found.add(node)
        node = operand(node, 0)
    return found


def short_name(linear: Linear) -> str:
    """What its module is called in its block; the same in every layer, so that reasons can be told together."""
    return linear.weight_name.rpartition(".")[0].rpartition(".")[2]


class Reach:
    """Searches over one program as it stands; make a new one after the graph has changed."""

    def __init__(self, program: Program, *, ties: bool = True, biases: Mapping[str, str] | None = None) -> None:
        """Without `ties`, a tensor that has several names may change under all of them. `biases` names the bias that
        may be created beside a weight."""
        self.program = program
        self._ties = ties
        self.biases = biases or {}
        self.writers = {entry.written: entry for entry in program.ledger}
        self.owner = {node: entry for entry in program.ledger for node in entry.nodes}
        linears = [linear for site in program.sites for linear in site.linears.values()]
        self.linears = {linear.node: linear for linear in linears}
        self._rows: dict[tuple[fx.Node, fx.Node, str], torch.Tensor] = {}

    @cached_property
    def parameters(self) -> tuple[fx.Node, ...]:
        return tuple(self.program.placeholders("parameter").values())

    def streams(self, insertion: Insertion) -> dict[fx.Node, str]:
        """The nodes that a delta reads as h and as x."""
        streams = {insertion.before: "h"}
        x = self.input_of(insertion)
        if x is not None:
            streams[x] = "x"
        return streams

    def input_of(self, insertion: Insertion) -> fx.Node | None:
        """The node that the delta's subgraph now reads as x, or None where x is h or the delta has none."""
        x = insertion.x
        if x is None or x is insertion.before:
            return None
        while self.owner.get(x) is insertion and is_call(x, aten.to.dtype):
            x = operand(x, 0)
        if x is insertion.before:
            return None
        return x if self.owner.get(x) is insertion or x is insertion.original else self.program.current(x)

    def producer(self, insertion: Insertion) -> Path | None:
        """The linear whose output, or a part of it, is h."""
        node, met = insertion.original, []
        while node not in self.linears:
            if node in self.writers:
                met.append(self.writers[node])
                node = self.writers[node].original
            elif is_call(node, *VIEWS, *PIECES) or is_getitem(node):
                node = operand(node, 0)
            else:
                return None
        return Path(self.linears[node], tuple(met))

    def consumer(self, insertion: Insertion) -> Path | None:
        """The only linear that reads h', through dropout and later deltas at the same place; `met` are these, and the
        deltas that read h' as their own x."""
        met: dict[int, Insertion] = {}
        found: set[fx.Node] = set()
        queue = [insertion.written]
        while queue:
            node = queue.pop()
            for user in node.users:
                entry = self.owner.get(user)
                if entry is not None:
                    if id(entry) not in met and entry.original is node:
                        queue.append(entry.written)
                    met[id(entry)] = entry
                elif is_call(user, *DROPOUT):
                    queue.append(user)
                elif user in self.linears and operand(user, 0) is node:
                    found.add(user)
                else:
                    return None
        return Path(self.linears[found.pop()], tuple(met.values())) if len(found) == 1 else None

    def rows(self, insertion: Insertion, linear: Linear) -> torch.Tensor:
        """Which output rows of `linear` the tap of a delta is."""
        tap = insertion.site.taps[insertion.tap]
        key = (linear.node, tap.node, tap.layout)
        if key not in self._rows:
            self._rows[key] = selection(self.program, linear.node, tap.node, tap.layout)
        return self._rows[key]

    def shared_rows(self, insertion: Insertion, linear: Linear) -> str:
        """Who else reads the rows that a tap selects from a fused projection, or ""."""
        tap = insertion.site.taps[insertion.tap]
        if tap.node is linear.node:
            return ""
        own = set(self.rows(insertion, linear).tolist())
        queue = [(linear.node, linear.node)]
        while queue:
            node, part = queue.pop()
            modified = part is not node or (node in self.program.replaced and node is not linear.node)
            for user in self._base_users(node):
                if is_call(user, *VIEWS, *PIECES) or is_getitem(user):
                    queue.extend([(user, part if modified else user)] if user is not tap.node else [])
                elif isinstance(user.meta.get("val"), torch.Tensor) and self._overlaps(linear, part, own):
                    return f"{user} reads the same rows of {linear.weight_name}"
        return ""

    def _base_users(self, node: fx.Node) -> list[fx.Node]:
        users = [*node.users, *self.program.current(node).users]
        return [user for user in users if user not in self.owner]

    def _overlaps(self, linear: Linear, part: fx.Node, own: set[int]) -> bool:
        return bool(own & set(selection(self.program, linear.node, part, "flat").tolist()))

    def twins(self, insertion: Insertion) -> list[Insertion]:
        """The entries that are the same delta, with the same parameters and sizes, at other calls of the same module.

        What one of them does to a weight, all of them do.
        """
        site = insertion.site
        return [
            entry for entry in self.program.ledger
            if entry is not insertion and (entry.delta, entry.tap) == (insertion.delta, insertion.tap)
            and entry.parameters == insertion.parameters
            and (entry.site.kind, entry.site.path, entry.site.dims) == (site.kind, site.path, site.dims)
        ]  # fmt: skip

    def shared(self, linears: Iterable[Linear], alike: Collection[fx.Node] = frozenset()) -> str:
        """Why weights cannot be changed for one site alone, or ""; `alike` are readers that change with it."""
        for linear in linears:
            for name, node in ((linear.weight_name, linear.weight), (linear.bias_name, linear.bias)):
                reason = self.used_elsewhere(name, node, alike) if name is not None and node is not None else ""
                if reason:
                    return reason
        return ""

    def used_elsewhere(self, name: str, placeholder: fx.Node, alike: Collection[fx.Node] = frozenset()) -> str:
        """The other places that read a parameter, under its own name or one it is tied to, or ""."""
        if not self._ties and name in {*self.program.tied, *self.program.tied.values()}:
            return ""
        places = self._readers(placeholder)
        if len(places) > 1 and not places <= set(alike):
            where = ", ".join(sorted({module_path(p) for p in places}))
            used = f"{name} is used in {len(places)} places ({where}), and a checkpoint has one tensor for all of them"
            return used + ("; it is tied" if name in {*self.program.tied, *self.program.tied.values()} else "")
        first = self.program.tied.get(name, name)
        for other, node in self.program.placeholders("parameter").items():
            if other != name and self.program.tied.get(other, other) == first and self._readers(node):
                return f"{name} is tied to {other}"
        return ""

    def _readers(self, placeholder: fx.Node) -> set[fx.Node]:
        """Nodes of the base graph that read a parameter, whatever a delta has put in its place since."""
        own = {user for user in placeholder.users if user not in self.owner}
        return own | {user for node, user in self.program.replaced_at if node is placeholder}

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        return {node: index for index, node in enumerate(self.program.graph.nodes)}
