"""Traces that hold for one length only. Code that loops over the tokens (a scan of a state-space model, chunks of a
linear attention) or over images is written out by the tracer, one pass for each of its sample. The length is a number
in such a graph, where it should be a symbol (`Program.fixed`), or the number of chunks is assumed (`Program.guards`),
and a text of another length needs a trace of its own.

fitting(trace, specs, tensors, "Mamba")     # a program for these tensors, made by `trace`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from peftc.frontend.trace import InputSpec
    from peftc.ir.program import Program


def fitting(
    trace: Callable[[Mapping[str, InputSpec]], Program],
    specs: Mapping[str, InputSpec],
    tensors: Mapping[str, torch.Tensor],
    name: str,
) -> Program:
    """The program for inputs of these kinds that holds for the sizes of `tensors`; `name` is the model's."""
    while True:
        program = trace(specs)
        if not program.fixed and program.guards is None:
            return program
        sizes = sizes_of(specs, tensors)
        wrong = {axis: sizes[axis] for axis, size in program.fixed.items() if sizes.get(axis, size) != size}
        guards: Any = program.guards  # the decorator hides the signature
        if guards is not None:
            wrong |= {axis: sizes[axis] for axis in guards.broken(sizes)}
        if not wrong:
            return program
        warnings.warn(f"{name} is traced anew for each {_told(sorted(wrong))}", stacklevel=2)
        specs = pinned(specs, wrong)


def _told(axes: list[str]) -> str:
    """What changes from trace to trace, why, and what to do."""
    if {*axes} <= {"batch", "images", "sounds"}:
        return f"number of {' and '.join(axes)}: its code loops over them. Give few different numbers to trace seldom"
    return f"length of {' and '.join(axes)}: its code loops over the tokens. Pad to few lengths to trace seldom"


def one_past(program: Program) -> str | None:
    """Why a trace with a cache serves one step only, in words; None where it serves every step."""
    return "its trace holds for one length of the past only" if {"past", "window"} & program.fixed.keys() else None


def sizes_of(specs: Mapping[str, InputSpec], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """How long each named axis is in a call."""
    return {
        axis: size
        for name, spec in specs.items()
        if name in tensors
        for axis, size in zip(spec.sizes, tensors[name].shape, strict=True)
        if isinstance(axis, str)
    }


def pinned(specs: Mapping[str, InputSpec], sizes: Mapping[str, int]) -> dict[str, InputSpec]:
    """The inputs with these axes as numbers."""
    return {
        name: replace(
            spec, sizes=tuple(sizes.get(size, size) if isinstance(size, str) else size for size in spec.sizes)
        )
        for name, spec in specs.items()
    }
