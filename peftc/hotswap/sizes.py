"""Open sizes: the axes of delta parameters as symbols, to see which of them the graph leaves open.

Every axis of every parameter becomes a symbol of its own, and the deltas are inserted. torch unifies the symbols: two
axes that an op needs to be equal become one (the rank in A and in B), and one that must equal a number of the model, or
a size that an expression spells out, becomes that number. What is still a symbol then may be of any size, even 0.

    structure.shapes["...lora.q.A"]     # ("s0", 384): the rank is open
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from peftc.ir.program import DeltaParameter, Program
from peftc.passes.insert import Insert
from peftc.planning.plan import Plan

Shape = tuple["int | str", ...]
"""Sizes; a word stands for an open one, and the same word for the same size."""


def opened(plan: Plan, program: Program) -> Plan:
    """The plan with a symbol for every axis; an axis of size 0 or 1 stays, for torch reads 1 as "broadcast"."""
    fresh = _symbols(program)
    return _with_shapes(plan, lambda p: tuple(fresh(size) if size > 1 else size for size in p.shape))


def shapes_of(plan: Plan) -> dict[str, Shape]:
    """The shapes of an `opened` plan's parameters after it was inserted; open sizes are numbered in order."""
    words: dict[str, str] = {}
    found: dict[str, Shape] = {}
    for name, parameter in plan.parameters.items():
        sizes: list[int | str] = []
        for size in parameter.shape:
            number = number_of(size)
            sizes.append(words.setdefault(str(size), f"s{len(words)}") if number is None else number)
        found[name] = tuple(sizes)
    return found


def with_open(plan: Plan, program: Program, shapes: Mapping[str, Shape]) -> tuple[Plan, dict[str, torch.SymInt]]:
    """The plan with symbols where `shapes` have words, and the symbol of each word."""
    fresh = _symbols(program)
    symbols: dict[str, Any] = {}
    for parameter in plan.parameters.values():
        for word, size in zip(shapes[parameter.name], parameter.shape, strict=True):
            if isinstance(word, str) and word not in symbols:
                symbols[word] = fresh(size)
    made = _with_shapes(plan, lambda p: tuple(symbols.get(w, w) for w in shapes[p.name]))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return made, symbols


def insert(plan: Plan, program: Program) -> None:
    """Insert a plan with open sizes. torch warns of symbols among the arguments of ops; they are wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Raw SymInt", UserWarning)
        Insert(plan).apply(program)


def number_of(size: Any) -> int | None:
    """A size as a number, or None while it is open."""
    return int(size) if isinstance(size, int) else size.node.maybe_as_int()


def _symbols(program: Program) -> Any:
    """A function that makes a symbol of the shape environment; its argument is the size to reason with."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env: Any = program.fake_mode.shape_env
    env.unique_ids |= _taken(program)  # an environment that was read from a file does not know them
    numbers = _unused(env)

    def fresh(size: int) -> torch.SymInt:
        source = ConstantSource(f"peftc_size_{next(numbers)}")
        symbol = env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        return env.create_symintnode(symbol, hint=size, source=source)

    return fresh


def _taken(program: Program) -> set[int]:
    """The numbers of the symbols that stand in the program's shapes, such as 72 of s72."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    sizes = (size for value in values for size in getattr(value, "shape", ()) if not isinstance(size, int))
    return {
        int(symbol.name[1:]) for size in sizes for symbol in size.node.expr.free_symbols if symbol.name[1:].isdigit()
    }


def _unused(env: Any) -> Iterator[int]:
    """Numbers that no symbol of this environment was named by; copies of a program share theirs."""
    number: int = getattr(env, "peftc_sizes", 0)
    while True:
        number += 1
        env.peftc_sizes = number
        yield number


def _with_shapes(plan: Plan, shape: Any) -> Plan:
    made: dict[str, DeltaParameter] = {p.name: replace(p, shape=shape(p)) for p in plan.parameters.values()}
    edits = (
        replace(edit, parameters={key: None if p is None else made[p.name] for key, p in edit.parameters.items()})
        for edit in plan.edits
    )
    return replace(plan, edits=tuple(edits))
