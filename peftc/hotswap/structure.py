"""The structure of a delta directory's deltas: what the graph says of them when sizes and scales are left open.

Deltas of one structure share the inputs of one graph, whatever their ranks, scales or rules' names: LoRA and rsLoRA
differ in one number. What a number depends on is found by trying: each hyperparameter is set to another value, and
the numbers of the graph that follow it are lifted, which means they become inputs like the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from peftc.diagnostics import PeftcError
from peftc.hotswap.sizes import Shape, insert, number_of, opened, shapes_of
from peftc.ir.copying import copied
from peftc.ir.program import Insertion, Program, is_call
from peftc.lang.loader import parse_rule
from peftc.lang.rule import Hyper, Rule
from peftc.passes.insert import Insert
from peftc.planning.plan import Plan, make_plan

aten = torch.ops.aten

_ARITHMETIC = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


@dataclass(frozen=True, slots=True)
class Structure:
    """What deltas of one kind have in common, by way of an example."""

    rule: Rule
    """A rule that makes such deltas, of any sizes above 1."""
    shapes: dict[str, Shape]
    lifted: frozenset[tuple[str, int]]
    """Numbers that are inputs: the label of a delta, and which of its numbers."""
    signature: tuple[Any, ...]


def structure_of(rule: Rule, program: Program, fresh: frozenset[str]) -> Structure:
    """The structure of a rule's deltas on a located program, which stays as it is. Raises what the rule says."""
    example, trial = _without_ones(rule, program, fresh), copied(program)
    plan = opened(make_plan(example, trial, fresh=fresh), trial)
    insert(plan, trial)
    lifted = frozenset(_lifted(rule, program, fresh))
    shapes = shapes_of(plan)
    return Structure(example, shapes, lifted, _signature(trial, plan, shapes, lifted))


def numbers_of(rule: Rule, program: Program, fresh: frozenset[str]) -> tuple[tuple[float, ...], ...]:
    """The numbers that a rule's deltas calculate with, in each entry of the ledger."""
    trial = copied(program)
    Insert(make_plan(rule, trial, fresh=fresh)).apply(trial)
    return tuple(tuple(number for _, _, number in numbers_in(entry)) for entry in trial.ledger)


def numbers_in(entry: Insertion) -> list[tuple[fx.Node, int, float]]:
    """The numbers that an entry's nodes calculate with: the node, the place among its arguments, the number."""
    return [
        (node, index, argument)
        for node in entry.nodes
        if is_call(node, *_ARITHMETIC)
        for index, argument in enumerate(node.args)
        if isinstance(argument, (int, float)) and not isinstance(argument, bool)
    ]


def _without_ones(rule: Rule, program: Program, fresh: frozenset[str]) -> Rule:
    """The rule with ranks of 2 in place of 1, in which a size can be told from a broadcast axis."""
    for hyper in rule.hyper.values():
        if hyper.value == 1 and type(hyper.value) is int:
            rule = _set(rule, program, fresh, hyper.name, 2) or rule
    return rule


def _set(rule: Rule, program: Program, fresh: frozenset[str], name: str, value: object) -> Rule | None:
    """The rule with another value of a hyperparameter, or None where that is not admitted."""
    try:
        other = parse_rule(rule.text, "rule.yaml", {name: value})
        make_plan(other, copied(program), fresh=fresh)
    except PeftcError:
        return None
    return other


def _lifted(rule: Rule, program: Program, fresh: frozenset[str]) -> Iterator[tuple[str, int]]:
    before = _by_label(rule, program, fresh)
    for hyper in rule.hyper.values():
        for value in _others(hyper):
            other = _set(rule, program, fresh, hyper.name, value)
            after = {} if other is None else _by_label(other, program, fresh)
            if {k: len(v) for k, v in after.items()} == {k: len(v) for k, v in before.items()}:
                yield from ((k, i) for k in before for i, n in enumerate(before[k]) if n != after[k][i])
                break


def _is_number(hyper: Hyper) -> bool:
    return isinstance(hyper.value, (int, float)) and not isinstance(hyper.value, bool)


def _others(hyper: Hyper) -> list[object]:
    """Other values to try for a hyperparameter, near the one it has."""
    if not _is_number(hyper):
        return []
    value: Any = hyper.value
    if isinstance(value, int):
        return [value + 1, value * 2, value - 1]
    return [value * 1.25 + 0.0625, value * 0.75]


def _one_of_each(plan: Plan) -> Plan:
    """The first edit of each label, in which the same expressions stand as in the others."""
    if any(edit.delta.value is not None for edit in plan.edits):
        return plan  # a carried value is computed from that of the layer before
    first: dict[str, Any] = {}
    for edit in plan.edits:
        first.setdefault(edit.label, edit)
    return replace(plan, edits=tuple(first.values()))


def _by_label(rule: Rule, program: Program, fresh: frozenset[str]) -> dict[str, tuple[float, ...]]:
    trial = copied(program)
    Insert(_one_of_each(make_plan(rule, trial, fresh=fresh))).apply(trial)
    found: dict[str, tuple[float, ...]] = {}
    for entry in trial.ledger:
        found.setdefault(entry.delta, tuple(number for _, _, number in numbers_in(entry)))
    return found


def _signature(
    program: Program, plan: Plan, shapes: dict[str, Shape], lifted: frozenset[tuple[str, int]]
) -> tuple[Any, ...]:
    """Everything that deltas must have in common to share inputs: parameters, sites, and what is computed of them."""
    parameters = tuple(
        (p.name, p.dtype, p.init.name if p.init.name in ("zeros", "ones") else "", shapes[p.name])
        for p in plan.parameters.values()
    )
    ids: dict[fx.Node, Any] = {}
    for node, binding in program.bindings.items():
        ids[node] = binding.name
    inserted = program.inserted
    for node in program.graph.nodes:
        if node in inserted:
            ids[node] = ("node", len(ids))
    entries = tuple(
        (entry.delta, entry.site.kind, entry.site.path, entry.tap, entry.lowering, _nodes(entry, ids, lifted))
        for entry in program.ledger
    )
    return parameters, entries


def _nodes(entry: Insertion, ids: dict[fx.Node, Any], lifted: frozenset[tuple[str, int]]) -> tuple[Any, ...]:
    open_numbers = {(node, place) for i, (node, place, _) in enumerate(numbers_in(entry)) if (entry.delta, i) in lifted}

    def key(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ids.get(value, value.name)
        if isinstance(value, (list, tuple)):
            return tuple(key(item) for item in value)
        if isinstance(value, torch.SymInt):
            return number_of(value)
        return value if isinstance(value, (int, float, str, type(None))) else str(value)

    def written(node: fx.Node) -> Any:
        args = tuple("?" if (node, place) in open_numbers else key(a) for place, a in enumerate(node.args))
        return str(node.target), args, tuple((name, key(value)) for name, value in sorted(node.kwargs.items()))

    return tuple(written(node) for node in entry.nodes)
