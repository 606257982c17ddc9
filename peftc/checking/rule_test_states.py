"""The tensors that the tests of a rule run with, and how far the outputs of two runs are apart.

state = random_state(subject, program, plan)      # noise on all that trains
distance(subject.outputs, subject.run(program, state))
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftc.checking.families import Subject

if TYPE_CHECKING:
    from peftc.ir.initial import Saved
    from peftc.ir.program import Program
    from peftc.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class State:
    """Tensors by name, as the fold reads them."""

    values: dict[str, torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        return self.values[name]


def distance(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> float:
    """The largest difference of two models' outputs, over the largest magnitude of that output where beyond 1.

    Infinity where shapes differ or where anything is not finite.
    """
    worst = 0.0
    for ours, theirs in zip(one, other, strict=True):
        if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
            return float("inf")
        for a, b in zip(ours, theirs, strict=True):
            apart = float((a.double() - b.double()).abs().max() / max(1.0, float(a.abs().max())))
            worst = max(worst, apart if apart == apart else float("inf"))
    return worst


def finite(outputs: list[list[torch.Tensor]]) -> bool:
    """Whether no output holds NaN or infinity."""
    return all(bool(torch.isfinite(value).all()) for values in outputs for value in values)


def initial_state(subject: Subject, plan: Plan) -> dict[str, torch.Tensor]:
    """The tensors of the base, and the deltas' as they start."""
    from peftc.runtime.init import Initializer

    start = Initializer(plan.parameters, 0, subject.state.__getitem__, _stand_in)
    return {**subject.state, **{name: start(name) for name in plan.parameters}}


def _stand_in(saved: Saved) -> torch.Tensor:
    """What a test takes for the tensor of a stored delta: no directory is read."""
    seed = zlib.crc32(f"{saved.hyper}.{saved.slot.name(saved.parameter)}".encode())
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(saved.shape, generator=generator, dtype=torch.float64)


def random_state(subject: Subject, program: Program, plan: Plan) -> dict[str, torch.Tensor]:
    """Noise on everything that trains; frozen tensors of the deltas stay as they start."""
    state = initial_state(subject, plan)
    generator = torch.Generator().manual_seed(3)
    for name in sorted(plan.trainable):
        noise = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
        state[name] = state[name] + 0.3 * noise.to(state[name].dtype)
    for name, first in program.tied.items():
        state[name] = state[first]
    return state
