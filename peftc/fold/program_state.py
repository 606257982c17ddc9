"""What a folded program needs: its graph without the folded deltas, and every tensor, at once or one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftc.fold.constants import evaluate_constants
from peftc.fold.evaluate import Read
from peftc.fold.state import FoldedState
from peftc.ir.copying import copied

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
    values.update(_take_out(read, program, fold))
    for binding in program.bindings.values():
        if binding.kind in ("parameter", "buffer") and binding.name not in values:
            values[binding.name] = read(binding.name)
    return values


def folded_program(read: Read, program: Program, folded: FoldedState) -> tuple[Program, dict[str, torch.Tensor]]:
    """A copy of `program` without its folded deltas, and the constants that the fold computed for it.

    `program` stays as it is: `folded`, whose updates read its graph, goes on giving the other tensors one at a time.
    """
    from peftc.passes.fold import Fold

    result, fold = copied(program), Fold()
    fold.apply(result)
    constants = _take_out(read, result, fold)
    for node, binding in result.bindings.items():
        if binding.kind == "parameter" and binding.name in folded.touched:
            like = node.meta["val"]
            shape = folded.shape(binding.name, tuple(like.shape))
            result.resize(node, torch.empty(shape, dtype=like.dtype, device="meta"))
    result.propagate()
    return result, constants


def _take_out(read: Read, program: Program, fold: Fold) -> dict[str, torch.Tensor]:
    """Take folded deltas out of `program`; returns what it then reads of constants that were computed here."""
    fold.remove(program)
    remaining = [d.insertion for d in fold.decisions if d.result in ("constant", "kept")]
    constants = evaluate_constants(program, remaining, read)
    program.drop_unused_deltas()
    return constants
