"""Every tensor that a folded program needs: folded, kept and constant ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftc.fold.constants import evaluate_constants
from peftc.fold.evaluate import Read
from peftc.fold.state import FoldedState

if TYPE_CHECKING:
    from peftc.ir.program import Program
    from peftc.passes.fold import Fold


def folded_program_state(read: Read, program: Program, fold: Fold) -> dict[str, torch.Tensor]:
    """`folded_state`, and the shapes of the program's nodes in step with it, as an export needs them."""
    values = folded_state(read, program, fold)
    for node, binding in program.bindings.items():
        if binding.kind == "parameter":
            program.resize(node, values[binding.name])
    program.propagate()
    return values


def folded_state(read: Read, program: Program, fold: Fold) -> dict[str, torch.Tensor]:
    """Take folded deltas out of `program` and return every tensor it then needs; `read` gives the unfolded ones."""
    folded = FoldedState(read, fold.updates)
    values = {name: folded(name) for name in folded.touched}
    fold.remove(program)
    remaining = [d.insertion for d in fold.decisions if d.result in ("constant", "kept")]
    values.update(evaluate_constants(program, remaining, read))
    program.drop_unused_deltas()
    for binding in program.bindings.values():
        if binding.kind in ("parameter", "buffer") and binding.name not in values:
            values[binding.name] = read(binding.name)
    return values
