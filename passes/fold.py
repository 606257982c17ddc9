"""fold: take what can be folded out of the graph and say how the base's tensors change instead.

Merged and widened deltas leave the graph; constant ones stay with their parameters evaluated at export; kept ones
stay as they are. The pass changes no tensor: it leaves the updates to be applied when weights are written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from peftc.fold.decide import Decision, Room, decide
from peftc.fold.updates import Update, updates_for
from peftc.ir.program import Program


@dataclass(slots=True)
class Fold:
    """Fold every insertion that folds. `decisions` and `updates` are filled by `apply`."""

    name: ClassVar[str] = "fold"
    room: Room = field(default_factory=Room)
    decisions: list[Decision] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)

    def apply(self, program: Program) -> None:
        self.decisions = decide(program, self.room)
        self.updates = updates_for(program, self.decisions)

    def remove(self, program: Program) -> None:
        """Take the folded deltas out of the graph. The updates read it: compute their tensors first."""
        for decision in reversed(self.decisions):
            if decision.folds:
                _take_out(program, decision)
        program.graph.eliminate_dead_code()


def analyse_folds(program: Program) -> list[Decision]:
    """What would become of each insertion."""
    return decide(program)


def _take_out(program: Program, decision: Decision) -> None:
    insertion = decision.insertion
    own: set[fx.Node] = set(insertion.nodes)
    insertion.written.replace_all_uses_with(insertion.original, delete_user_cb=lambda user: user not in own)
