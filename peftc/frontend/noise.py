"""Noise that a module adds in training, beside dropout: jittered coordinates (DINOv3), a router that draws its experts
(Phi-MoE). A graph holds one mode's code for ever, and evaluation cannot take such noise out as it does a dropout.

A module that draws when it trains, and does not in evaluation, is traced as in evaluation. One that draws in either
mode (the masks of ViT-MAE) stays as it is. So does a module whose forward raises in training only, for it asks for
labels or for one length: it is the one that reads `training` nearest to the error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import fx

from peftc.ir.program import Program
from peftc.passes.set_mode import SetMode, draws

UNTRACEABLE = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)
"""What torch.export raises, and what a model's own forward raises, when the model cannot be traced."""


def without_noise(model: torch.nn.Module, make: Callable[[], Program]) -> Program:
    """What `make` gives, with the modules in evaluation mode that draw or raise in training only.

    Raises what `make` raises, the first time, where no mode of a module helps.
    """
    strict, program = _without_errors(model, make)
    drawing = noisy(program)
    while drawing:
        with evaluated(model, strict | drawing):
            quiet = make()
        if not (still := drawing & noisy(quiet)):
            return quiet
        drawing -= still
    return program


def _without_errors(model: torch.nn.Module, make: Callable[[], Program]) -> tuple[frozenset[str], Program]:
    asleep: frozenset[str] = frozenset()
    first: Exception | None = None
    while True:
        with evaluated(model, asleep):
            try:
                return asleep, make()
            except UNTRACEABLE as error:
                first = first or error
                strict = strict_in_training(model, error.__traceback__)
        if not strict:
            raise first from None
        asleep |= strict


def noisy(program: Program) -> frozenset[str]:
    """Paths of the modules that draw numbers in the evaluation graph."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    SetMode(training=False).apply_to(graph)
    drawn = set(draws(graph))
    stacks = (old.meta.get("nn_module_stack") or {} for old, new in mapping.items() if new in drawn)
    return frozenset(str([*stack.values()][-1][0]).partition("@")[0] for stack in stacks if stack)


def strict_in_training(model: torch.nn.Module, trace: TracebackType | None) -> frozenset[str]:
    """The path of the innermost module in a traceback whose forward reads `training`; none where no module does."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[str] = []
    while trace is not None:
        frame = trace.tb_frame
        held: Any = frame.f_locals.get("self")
        if id(held) in paths and held.training and "training" in frame.f_code.co_names:
            found.append(paths[id(held)])
        trace = trace.tb_next
    return frozenset(found[-1:])


@contextlib.contextmanager
def evaluated(model: torch.nn.Module, paths: frozenset[str]) -> Iterator[None]:
    """These modules, without those inside them, in evaluation mode for as long as the context lasts."""
    modules = [model.get_submodule(path) for path in paths]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
