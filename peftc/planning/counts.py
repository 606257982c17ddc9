"""How many parameters a rule costs, counted three ways.

trained   elements that the optimizer moves: deltas that are not frozen, base parameters that the rule trains, and a
          head that the checkpoint does not hold
stored    elements in the delta directory: frozen deltas too
paper     as He et al. (2022) count: what a method adds to the model that is used. Biases of linear layers and norms
          inside a delta are left out, a new head too, and of a prefix that an MLP makes the prefix alone counts

counts_of(plan, program).describe()   # "stores 27,475,968; by the paper's convention 27,377,664 (6.74 %)"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

import torch
from torch import fx

from peftc.fold.affine import Constant, classify
from peftc.fold.constants import unwrapped
from peftc.ir.program import Insertion, Program, is_call
from peftc.planning.plan import Plan

aten = torch.ops.aten

_LEFT_OUT: Final = {
    aten.linear.default: (2,), aten.layer_norm.default: (2, 3), aten.native_layer_norm.default: (2, 3),
    aten.rms_norm.default: (2,),
}  # fmt: skip
"""The operands of an op that the paper does not count."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Elements by each way of counting, and those of the base."""

    trained: int
    stored: int
    paper: int
    base: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    def describe(self) -> str:
        """One line for people, beside the one that tells what trains."""
        share = 100 * self.paper / self.base
        return f"stores {self.stored:,}; by the paper's convention {self.paper:,} ({share:.2f} %)"


def counts_of(plan: Plan, program: Program) -> Counts:
    """The counts of a plan, and of the program that it has rewritten."""
    rows = sum(_row(plan, program, delta.name) for delta in plan.rule.deltas)
    base = sum(plan.base_sizes[name] for name in plan.trained if name not in plan.fresh)
    return Counts(plan.trained_count, plan.stored_count, rows + base, plan.base_count)


def _row(plan: Plan, program: Program, delta: str) -> int:
    """What one row adds: its parameters, or what is computed of parameters alone where that is less."""
    nodes = program.placeholders("parameter")
    own = {nodes[name]: p.numel for name, p in plan.parameters.items() if p.delta == delta and not p.frozen}
    inserted, after = program.inserted, {entry.after for entry in program.ledger}
    aside = {node for node in own if _left_out(node, inserted, after)}
    counted = sum(size for node, size in own.items() if node not in aside)
    entries = [entry for entry in program.ledger if entry.delta == delta]
    left = {node: None for entry in entries for node in _constants(entry, nodes.values())}
    sizes = [node.meta["val"].numel() for node in left if node not in aside]
    return min(counted, sum(sizes)) if entries else counted


def _constants(entry: Insertion, parameters: Iterable[fx.Node]) -> list[fx.Node]:
    """What an insertion reads once all is computed that needs no input: parameters, and values made of them."""
    kinds = classify(entry.nodes, {}, parameters)
    reading = [node for node in entry.nodes if not isinstance(kinds[node], Constant)]
    read = [operand for node in reading for operand in node.all_input_nodes]
    last = [node for node in entry.nodes if isinstance(kinds[node], Constant) and not kinds.keys() >= node.users.keys()]
    return [unwrapped(node) for node in (*read, *last) if isinstance(kinds.get(node), Constant)]


def _left_out(value: fx.Node, inserted: set[fx.Node], after: set[fx.Node]) -> bool:
    """Whether all that reads a parameter are ops of deltas that take it as a bias, or as gain or shift of a norm.

    `after` are the nodes in which a delta joins h: what is added there is the delta itself.
    """
    return all(user in inserted and _takes_aside(value, user, inserted, after) for user in value.users)


def _takes_aside(value: fx.Node, user: fx.Node, inserted: set[fx.Node], after: set[fx.Node]) -> bool:
    if unwrapped(user) is not user:
        return _left_out(user, inserted, after)
    places = {at for at, operand in enumerate(user.args) if operand is value}
    if any(is_call(user, op) and places <= set(aside) for op, aside in _LEFT_OUT.items()):
        return True
    added = is_call(user, aten.add.Tensor) and user not in after
    return added and all(operand is value or operand in inserted for operand in user.all_input_nodes)
