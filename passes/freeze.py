"""freeze: say which parameters train. Everything of the base is frozen but what the rule names under `train` and a
head that the checkpoint does not hold; a delta's parameters train unless they are marked `frozen`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftc.ir.program import Program
from peftc.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Freeze:
    """Fill `program.trainable` from `plan`."""

    name: ClassVar[str] = "freeze"
    plan: Plan

    def apply(self, program: Program) -> None:
        program.trainable = self.plan.trainable
